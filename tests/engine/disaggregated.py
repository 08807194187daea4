"""Two engines in processes of their own: one reads prompts, the other takes its cache over and answers.

`Engine(...)` starts one; its `ask` is as that of `offloaded.py`, and `prefill` says what the other has to be told.
"""

import multiprocessing
import socket
from typing import Any

SIDE_CHANNEL = "VLLM_NIXL_SIDE_CHANNEL_PORT"
WAIT_SECONDS = 900


class Engine:
    """An engine with a NixlConnector, and the pipe to it."""

    def __init__(self, model: str, role: str, lexico: dict[str, Any], settings: dict[str, Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, model, role, lexico, settings, _free_port()))
        self.process.start()

    def call(self, name: str, *args: Any) -> Any:
        """What a function of this module returns there."""
        self.pipe.send((name, args))
        assert self.pipe.poll(WAIT_SECONDS), f"{name} takes too long"
        said = self.pipe.recv()
        if isinstance(said, Exception):
            raise said
        return said

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join(60)
        self.process.kill()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def _serve(pipe: Any, model: str, role: str, lexico: dict[str, Any], settings: dict[str, Any], port: int) -> None:
    import os

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", SIDE_CHANNEL: str(port)}
    from engines import start
    from offloaded import forget_windows
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(kv_connector="NixlConnector", kv_role=role)
    try:
        forget_windows()
        llm = start(model, "LEXICO", lexico, settings | {"kv_transfer_config": connector, "disable_log_stats": False})
    except Exception as error:
        pipe.recv()
        pipe.send(RuntimeError(str(error)))
        return
    while (job := pipe.recv()) is not None:
        name, args = job
        try:
            pipe.send(globals()[name](llm, *args))
        except Exception as error:
            pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def prefill(llm: Any, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Read prompts; returns what the engine that answers has to be told of each."""
    import vllm

    asked = {"do_remote_decode": True, "do_remote_prefill": False}
    params = vllm.SamplingParams(
        temperature=0, max_tokens=1, detokenize=False, extra_args={"kv_transfer_params": asked}
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [output.kv_transfer_params for output in outputs]


def ask(llm: Any, prompts: list[list[int]], told: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Answers, with the other engine's cache where `told` has what it said; also why they ended, and warnings."""
    import logging

    import vllm
    from offloaded import TOKENS, external_hits

    said: list[str] = []
    log = logging.getLogger("vllm")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage() + str(record.exc_info or ""))  # type: ignore[method-assign]
    log.addHandler(handler)
    before, rows = external_hits(llm), []
    for place, prompt in enumerate(prompts):
        extra = {"kv_transfer_params": told[place]} if told else None
        params = vllm.SamplingParams(
            temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0, extra_args=extra
        )
        rows += llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    log.removeHandler(handler)
    answers = [row.outputs[0] for row in rows]
    return {
        "tokens": [list(one.token_ids) for one in answers],
        "logprobs": [
            [row[t].logprob for t, row in zip(one.token_ids, one.logprobs or (), strict=False)] for one in answers
        ],
        "cached": [row.num_cached_tokens for row in rows],
        "ended": [one.finish_reason for one in answers],
        "external": external_hits(llm) - before,
        "said": said,
    }


def reset(llm: Any) -> bool:
    """Forget the engine's own prefixes."""
    done: bool = llm.reset_prefix_cache()
    return done
