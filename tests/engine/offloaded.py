"""What engines answer when their cache comes back from host memory: `in_a_process(answer_from_host, ...)`."""

import sys
import time
from pathlib import Path
from typing import Any

from engines import ON_A_GPU, make_tokens, start

HOST_BYTES = 64 << 20
TOKENS = 6
LENGTHS = (300, 640)
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
STORED_SECONDS = 1.0  # on a GPU, until what was stored is in host memory


def connect(name: str, extra: dict[str, Any] | None = None) -> Any:
    """vLLM's configuration of an offloading connector."""
    from vllm.config import KVTransferConfig

    settings = {"cpu_bytes_to_use": HOST_BYTES, **(extra or {})}
    return KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_extra_config=settings)


def ask(llm: Any, prompts: list[list[int]]) -> dict[str, Any]:
    """Greedy answers one after the other: tokens, their log-probabilities, what any cache had, accepted drafts."""
    import vllm

    params = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=0)
    before, accepted, rows = external_hits(llm), count(llm, ACCEPTED), []
    for prompt in prompts:
        rows += llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    said = [row.outputs[0] for row in rows]
    return {
        "tokens": [list(one.token_ids) for one in said],
        "logprobs": [[row[t].logprob for t, row in zip(one.token_ids, one.logprobs, strict=True)] for one in said],
        "cached": [row.num_cached_tokens for row in rows],
        "external": external_hits(llm) - before,
        "accepted": count(llm, ACCEPTED) - accepted,
    }


def external_hits(llm: Any) -> int:
    """Tokens that came through a connector."""
    return count(llm, "vllm:external_prefix_cache_hits")


def count(llm: Any, name: str) -> int:
    """What vLLM counts for /metrics, 0 where it does not."""
    return int(sum(metric.value for metric in llm.get_metrics() if metric.name == name))


def forget_windows() -> None:
    """From here on prefix hits in the pool bring their sinks and nothing else of the tail."""
    from vllm_lexico.serve import tail_hits

    found = tail_hits.longest_hit

    def without_window(spec: Any, *args: Any, **kwargs: Any) -> Any:
        hit = found(spec, *args, **kwargs)
        pages = [page if place < spec.sink_blocks else None for place, page in enumerate(hit.pages)]
        return tail_hits.Hit(pages, hit.length)

    tail_hits.longest_hit = without_window


def answer_from_host(
    model: str, connector: str, lexico: dict[str, Any], settings: dict[str, Any], extra: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Answers cold, after a prefix hit without its window, and with all or the rest from host memory.

    Returns by name what `ask` does, and under "stored" blocks that the connector holds in host memory.
    """
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from bench.host_memory import copy_on_the_host

    if not ON_A_GPU:
        copy_on_the_host()
    forget_windows()
    connected = {"kv_transfer_config": connect(connector, extra), "disable_log_stats": False}
    llm = start(model, "LEXICO", lexico, settings | connected)
    prompts = [make_tokens(length, length) for length in LENGTHS]
    found = {"cold": ask(llm, prompts), "hit": ask(llm, prompts)}
    store_all(llm)
    assert llm.reset_prefix_cache()
    found["host"] = ask(llm, prompts)
    assert llm.reset_prefix_cache()
    found["start"] = ask(llm, [prompt[:140] for prompt in prompts])
    store_all(llm)
    found["rest"] = ask(llm, prompts)
    found["stored"] = stored_blocks(llm)
    for fault in (lose_sinks, lose_codes):
        store_all(llm)
        assert llm.reset_prefix_cache()
        heal = fault(llm)
        found[fault.__name__] = ask(llm, prompts)
        heal()
    return found


def store_all(llm: Any) -> None:
    """Wait until the blocks that were computed are in host memory, and are nobody's on the GPU.

    Copies to it are handed out, and reported, with the steps of later requests.
    """
    for _ in range(2 if ON_A_GPU else 0):
        ask(llm, [make_tokens(7, 5)])
        time.sleep(STORED_SECONDS)


def _connector(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler.connector


def stored_blocks(llm: Any) -> int:
    """Blocks in host memory."""
    connector = _connector(llm)
    if getattr(connector, "scheduler_manager", None) is not None:
        return len(connector.scheduler_manager.cpu_block_pool.cached_block_hash_to_block)
    return len(connector.connector_scheduler.manager._policy.chunks)


def lose_sinks(llm: Any) -> Any:
    """Loads leave out what goes to the tail."""
    return _lose(llm, 1)


def lose_codes(llm: Any) -> Any:
    """Loads leave out what goes to code pages."""
    return _lose(llm, 0)


def _lose(llm: Any, group: int) -> Any:
    """Have the worker clear, after each load, the pages of a group that it loaded."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    worker = get_kv_transfer_group()
    part = worker.worker_handler if hasattr(worker, "worker_handler") else worker.connector_worker
    manager = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    caches = [
        layer.kv_cache
        for name, layer in llm.llm_engine.vllm_config.compilation_config.static_forward_context.items()
        if name.endswith("lexico_tail") == bool(group)
    ]
    finished = part.get_finished

    def get_finished(*args: Any) -> Any:
        result = finished(*args)
        for request in result[1] or ():
            for page in manager.get_block_ids(request)[group]:
                for cache in caches if page else ():
                    cache[page] = 0
        return result

    part.get_finished = get_finished

    def heal() -> None:
        part.get_finished = finished

    return heal
