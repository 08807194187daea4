"""One vLLM engine with one cache, in this process, as the tasks use it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

from vllm_lexico import register
from vllm_lexico.errors import refusal
from vllm_lexico.evals.caches import Cache
from vllm_lexico.evals.harness import HarnessModel
from vllm_lexico.evals.held import PoolMeter, capacity_tokens, plain_token_bytes, token_bytes
from vllm_lexico.evals.peers import fix_turboquant
from vllm_lexico.evals.settings import EvalSettings


def unread_caches(worker: Any) -> set[str]:
    """What the attention layers of a worker were told to keep and their backends do not know, in words.

    Why: vLLM's CUDA platform refuses such a pair at start. Its CPU platform does not ask: it takes TurboQuant's names,
    gives those layers eight bits per number and reads them as if they were 16, which bytes alone do not tell from a
    cache. How: each layer's backend is asked for its layer's dtype. Upstream: no issue is known. Can go when
    `CpuPlatform.get_attn_backend_cls` asks the backend, as `CudaPlatformBase.get_valid_backends` does.
    """
    from vllm.config import set_current_vllm_config

    unread = set()
    with set_current_vllm_config(worker.vllm_config):  # what a backend knows may depend on it
        for layer in worker.vllm_config.compilation_config.static_forward_context.values():
            backend, dtype = getattr(layer, "attn_backend", None), getattr(layer, "kv_cache_dtype", None)
            if backend is not None and dtype is not None and not backend.supports_kv_cache_dtype(dtype):
                unread.add(f"its {backend.get_name()} does not know {dtype}")
    return unread


def check_cache(name: str, unread: Sequence[str], token_bytes: float, plain_token_bytes: int) -> None:
    """Refuse a cache that vLLM accepted by its name and does not have.

    Args:
        name: of the cache.
        unread: what `unread_caches` found in the workers.
        token_bytes: that a token takes in the pool.
        plain_token_bytes: that it takes in 16 bits.

    Raises:
        RuntimeError: a backend does not know its layer's dtype, or the cache saves nothing.
    """
    reasons = list(unread)
    if token_bytes >= plain_token_bytes:
        reasons.append(f"a token takes {token_bytes:.0f} bytes, no fewer than in 16 bits")
    if reasons:
        raise RuntimeError(
            f"vLLM started with {name}, but {' and '.join(reasons)}; the platform does not have this cache"
        )


def check_arguments(given: Iterable[str]) -> None:
    """Refuse names of --engine-arguments that vLLM's LLM() does not take.

    Raises:
        ValueError: in one sentence, with the known name that is most alike.
    """
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    known = {each.name for each in fields(EngineArgs)} | set(signature(LLM.__init__).parameters)
    known -= {"self", "model", "kwargs"}  # the model is given without a name
    for name in given:
        if name not in known:
            alike = get_close_matches(name, known, 1)
            remedy = f"write {alike[0]}, or remove it" if alike else "remove it"
            allowed = f"the {len(known)} names of arguments of vLLM's LLM() but for model"
            raise ValueError(refusal("--engine-arguments", name, allowed, remedy))


def model_tokens(model: str, arguments: Mapping[str, Any]) -> int:
    """Tokens that a model reads, as vLLM derives it from its configuration.

    Args:
        model: a checkpoint's folder or hub id.
        arguments: of vLLM's engine; those that change the configuration are heeded.
    """
    from vllm.engine.arg_utils import EngineArgs

    known = {each.name for each in fields(EngineArgs)} - {"model", "max_model_len"}
    of_model = {name: value for name, value in arguments.items() if name in known}
    return EngineArgs(model=model, **of_model).create_model_config().max_model_len


def dictionary_paths(worker: Any) -> set[str]:
    """Files of the dictionaries that a worker's layers of LEXICO have loaded."""
    layers = worker.vllm_config.compilation_config.static_forward_context.values()
    setups = [getattr(getattr(layer, "impl", None), "setup", None) for layer in layers]
    return {str(setup.dictionary_path) for setup in setups if setup is not None and setup.dictionary_path is not None}


class Engine:
    """A running engine; greedy.

    Args:
        settings: of the evaluation.
        cache: the engine's.
        needed_tokens: of the longest sequence, where the settings give no other `max_model_len`.
        with_harness: run it through lm-evaluation-harness's model.

    Attributes:
        llm: vLLM's own object.
        meter: what sequences held, and how many have ended.
        harness: lm-evaluation-harness's model around the engine, or None.
        dictionary_path: LEXICO's dictionary, or None.
        token_bytes: that a token adds to the pool.
        plain_token_bytes: that it takes in 16 bits, in the same layers.
        max_model_len: tokens of the longest sequence.
        limited_by_model: whether the model reads less than `needed_tokens`.
        notes: what a user has to know of the task that runs; the worker keeps them with its result.
        expect: called with the number of sequences of a task that starts; the worker shows it.
    """

    def __init__(self, settings: EvalSettings, cache: Cache, needed_tokens: int, *, with_harness: bool = False) -> None:
        # The scheduler and its pool are read and steered here, so they must not run in a process of their own.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        register()  # a checkout that is only on the path has no entry point for vLLM to find
        arguments: dict[str, Any] = {"seed": 0, **settings.engine, **cache.engine}
        self.limited_by_model = False
        if "max_model_len" not in arguments:
            limit = model_tokens(settings.model, arguments)
            self.limited_by_model = limit < needed_tokens
            arguments["max_model_len"] = min(limit, needed_tokens)
        self.notes: list[str] = []
        self.harness: Any = None
        if with_harness:
            self.harness = HarnessModel(settings.model, arguments)
            self.llm = self.harness.llm
        else:
            from vllm import LLM

            self.llm = LLM(settings.model, **arguments)
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        kv_cache_config = self.scheduler.kv_cache_config
        self.meter = PoolMeter(self.scheduler, kv_cache_config)
        self.token_bytes = token_bytes(kv_cache_config, self.max_model_len)
        self.plain_token_bytes = plain_token_bytes(kv_cache_config, self.max_model_len)
        self._check_cache(cache)
        if self.vllm_config.cache_config.cache_dtype.startswith("turboquant_"):
            self.llm.collective_rpc(fix_turboquant)
        paths = set().union(*self.llm.collective_rpc(dictionary_paths))
        assert len(paths) <= 1, paths
        self.dictionary_path = Path(paths.pop()) if paths else None
        self.expect: Callable[[int], None] = lambda _total: None

    def _check_cache(self, cache: Cache) -> None:
        """Refuse figures of a cache that is not there (see `check_cache`)."""
        if cache.engine.get("kv_cache_dtype", "auto") != "auto":
            unread = sorted(set().union(*self.llm.collective_rpc(unread_caches)))
            check_cache(cache.name, unread, self.token_bytes, self.plain_token_bytes)

    @property
    def vllm_config(self) -> Any:
        """The configuration that vLLM derived."""
        return self.llm.llm_engine.vllm_config

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, with its answer."""
        return self.vllm_config.model_config.max_model_len

    def note(self, words: str) -> None:
        """Keep a line with the result of the task that runs."""
        print(words, flush=True)
        self.notes.append(words)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.llm.get_tokenizer()

    def capacity_tokens(self) -> int:
        """Tokens that the pool holds, without sequences' tails."""
        return capacity_tokens(self.scheduler.kv_cache_config, self.max_model_len)

    def generate(self, prompts: Sequence[Sequence[int]], **params: Any) -> list[Any]:
        """Answers to prompts of token ids, all at once; `params` are those of vLLM's SamplingParams."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, **params)
        inputs: Any = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(inputs, sampling, use_tqdm=False)

    def forget(self) -> None:
        """Empty the prefix cache, so that no task finds what another left."""
        self.llm.reset_prefix_cache()

    @contextlib.contextmanager
    def chunks_of(self, tokens: int, sequences: int) -> Iterator[None]:
        """Compute prompts in chunks of at most `tokens`, those of `sequences` prompts of one length side by side.

        Why: vLLM's own limit, long_prefill_token_threshold, does not hold for a request that is alone. How: the budget
        of a step is limited too, to what the sequences take: they then advance in step and end in the same one.
        Upstream: intended there (`Scheduler.schedule` applies it from the second long request on). Can go when vLLM
        has a limit on the chunk of a single request that can change between requests.

        Raises:
            RuntimeError: a step exceeds the limit all the same; it would measure a cache that nothing was read from.
        """
        scheduler, config = self.scheduler, self.scheduler.scheduler_config
        before = config.long_prefill_token_threshold, scheduler.max_num_scheduled_tokens
        config.long_prefill_token_threshold = tokens
        scheduler.max_num_scheduled_tokens = min(tokens * sequences, before[1])
        schedule = scheduler.schedule

        def checked(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            longest = max(output.num_scheduled_tokens.values(), default=0)
            if longest > tokens:
                raise RuntimeError(f"vLLM computed {longest} tokens of a prompt in one step; the limit was {tokens}")
            return output

        scheduler.schedule = checked
        try:
            yield
        finally:
            del scheduler.schedule  # the method of its class shows again
            config.long_prefill_token_threshold, scheduler.max_num_scheduled_tokens = before
