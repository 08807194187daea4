"""Answers of an engine whose KV heads have other sparsities: `in_a_process(answer_unevenly, ...)`."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from engines import ask, make_tokens, plant_each, start

PROMPTS = [make_tokens(30 + length, length) for length in (300, 411, 640)]
TOKENS, FAULTY_TOKENS = 24, 8
# A request takes some 24 pages with its prompt and 37 with its answer, whose last tokens read codes.
CROWD, CROWD_TOKENS = [make_tokens(60 + i, 170) for i in range(4)], 100
SMALL_POOL = {"num_gpu_blocks_override": 130, "max_num_seqs": 4, "disable_log_stats": False}


@contextmanager
def heads_in_the_models_order():
    """A layer forgets to put its heads into its parts' order; results are put back all the same."""
    from vllm_lexico.serve.layer_parts import HeadOrder

    original, HeadOrder.batch = HeadOrder.batch, lambda _, *batch: batch
    yield
    HeadOrder.batch = original


@contextmanager
def codes_of_the_first_part():
    """A decoding token reads every part's codes where the first part's are."""
    from vllm_lexico.serve.layer_parts import LayerParts

    original = LayerParts.sparse_decode

    def decode(parts: LayerParts, *args: Any, **kwargs: Any) -> Any:
        place, moved = parts.parts[0].cache.code_pages, []
        for part in parts.parts:
            codes = place.as_strided((len(place), part.cache.code_pages.shape[1]), place.stride())
            moved.append(replace(part, cache=replace(part.cache, code_pages=codes)))
        return original(replace(parts, parts=tuple(moved)), *args, **kwargs)

    LayerParts.sparse_decode = decode
    yield
    LayerParts.sparse_decode = original


OWN_FAULTS = {"order": heads_in_the_models_order, "first part": codes_of_the_first_part}


def answer_unevenly(model: str, lexico: dict[str, Any]) -> dict[str, Any]:
    """What an engine answers to prompts one at a time, and with faults planted.

    Returns:
        cold: tokens of answers.
        faults: the first of them with each fault planted, by its name.
        parts, orders: of each layer, how many heads each part has, and the order of the heads or None.
    """
    llm = start(model, "LEXICO", lexico, {})
    cold, faults = ask(llm, PROMPTS, TOKENS)[0], {}
    for fault in plant_each(llm):
        llm.reset_prefix_cache()
        faults[fault] = ask(llm, PROMPTS, FAULTY_TOKENS)[0]
    for fault, planted in OWN_FAULTS.items():
        llm.reset_prefix_cache()
        with planted():
            faults[fault] = ask(llm, PROMPTS, FAULTY_TOKENS)[0]
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    bound = [layer.impl._cache for layer in layers if hasattr(layer, "impl")]
    return {
        "cold": cold,
        "faults": faults,
        "parts": [[part.cache.layout.num_kv_heads for part in one.parts] for one in bound],
        "orders": [None if one.order is None else one.order.kv_heads.tolist() for one in bound],
    }


def answer_alike(model: str, lexico: dict[str, Any]) -> dict[str, Any]:
    """What an engine that answers alike cold and after hits answers alone, again, and in a pool too small for all.

    Returns:
        alone, crowded: tokens of answers.
        again: of the first one's, after a hit of so many tokens as `hits` says.
        preempted: requests that lost their pages.
    """
    llm = start(model, "LEXICO", lexico | {"prefix_hits": "same"}, SMALL_POOL)
    alone = [ask(llm, [prompt], CROWD_TOKENS)[0][0] for prompt in CROWD]
    llm.reset_prefix_cache()
    crowded, _ = ask(llm, CROWD, CROWD_TOKENS)
    (preempted,) = [one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions"]
    llm.reset_prefix_cache()
    ask(llm, CROWD[:1], 1)
    again, hits = ask(llm, CROWD[:1], CROWD_TOKENS)
    return {"alone": alone, "again": again, "crowded": crowded, "hits": hits, "preempted": preempted}
