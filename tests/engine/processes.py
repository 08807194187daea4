"""Engines in processes of their own that start in seconds: vLLM is imported once, and forked from there.

An engine leaves things behind: a process where drafts were used cannot start another one on a CPU.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from engines import ON_A_GPU

IMPORTED_ONCE = ["vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker", "vllm.model_executor.models.llama", "faults"]


def in_a_process(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """What a function of this folder's helpers returns, or raises, in a process where nothing ran before."""
    # pytest names test modules by their path, by which another process does not find them.
    assert "." not in function.__module__, f"{function.__module__}.{function.__name__} belongs into a helper's file"
    # What vLLM imports may touch a GPU, which no fork can use then.
    context = multiprocessing.get_context("spawn" if ON_A_GPU else "forkserver")
    if not ON_A_GPU:
        context.set_forkserver_preload(IMPORTED_ONCE)
    with ProcessPoolExecutor(1, context, _engine_in_this_process) as process:
        return process.submit(function, *args, **kwargs).result()


def _engine_in_this_process() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    gc.freeze()  # what was imported is never garbage, and vLLM collects often
