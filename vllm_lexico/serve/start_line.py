"""The line at start that says what the cache costs and holds."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import TYPE_CHECKING, Any

from vllm_lexico.compat import layers as compat_layers

if TYPE_CHECKING:
    from lexico_kernels import CodeLayout
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_lexico.serve.setup import LexicoSetup

logger = logging.getLogger("vllm.lexico")


def describe_start(
    setup: LexicoSetup, layout: CodeLayout, num_layers: int, num_tokens: int, others: str = "", draft_bytes: int = 0
) -> str:
    """Codec, dictionary, bytes per token compared with 16 bits, and tokens that fit, in one line.

    Args:
        num_layers: layers of this rank that are coded.
        num_tokens: tokens that the cache holds in requests of the longest length, as vLLM counts them.
        others: what other layers keep, a clause with a leading "; ", or "".
        draft_bytes: per token, of layers that draft, which are raw.
    """
    sparsity, dictionary = setup.config.sparsity, setup.dictionary()
    atoms = (
        f"sparsity {sparsity.key}" if sparsity.key == sparsity.value else f"sparsity {sparsity.key}/{sparsity.value}"
    )
    if setup.config.uneven is not None:
        low, high = setup.config.uneven
        heads = [own for _, of_layer in setup.sparsities for own in of_layer]
        much = heads.count(high)
        atoms += f" on average ({high} in {much} KV heads, {low} in {len(heads) - much})"
    what = f"{layout.codec}, {atoms}" if dictionary else "the exact codec (for tests)"
    source = (
        f", dictionary {dictionary.info.model_name} ({dictionary.info.atoms} atoms, {setup.dictionary_path})"
        if dictionary
        else ""
    )
    num_heads = layout.num_kv_heads * num_layers
    ours, raw = layout.cell_bytes * num_heads + draft_bytes, layout.raw_token_bytes * num_heads + draft_bytes
    drafts = f", {draft_bytes:,} of them raw for drafts" if draft_bytes else ""
    sinks = setup.sink_blocks(layout) * layout.tail_tokens
    return (
        f"LEXICO: {what}{source}; {ours:,} bytes per token instead of {raw:,} ({ours / raw:.2%}){drafts}, newest "
        f"{setup.window_tokens} and first {sinks} tokens exact{others}; {num_tokens:,} tokens fit"
    )


def log_start(setup: LexicoSetup, layout: CodeLayout, spec: AttentionSpec, vllm_config: Any) -> None:
    """Log `describe_start` on the first rank.

    Args:
        spec: cache spec of a group of codes.
    """
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    if get_tensor_model_parallel_rank() != 0:
        return
    coded, others = _cache_specs(setup, layout, spec, vllm_config)
    num_blocks = next(iter(coded)).kv_cache.shape[0]
    specs = {name: one for of_layer in (*coded.values(), others) for name, one in of_layer.items()}
    requests = compat_layers.max_requests(vllm_config, specs, num_blocks)
    num_tokens = int(requests * vllm_config.model_config.max_model_len)
    drafts = [one for one in others.values() if type(one) is FullAttentionSpec]
    draft_bytes = sum(dataclasses.replace(one, block_size=1, page_size_padded=None).page_size_bytes for one in drafts)
    bounded = [one.max_memory_usage_bytes(vllm_config) for one in others.values() if type(one) is not FullAttentionSpec]
    kept = f"keep {sum(bounded) / 2**20:,.1f} MiB a request"
    clause = f"; {len(bounded)} layers with windows or states {kept}" if bounded else ""
    logger.info(describe_start(setup, layout, len(coded), num_tokens, clause, draft_bytes))


@functools.cache
def log_new_weights(setup: LexicoSetup) -> None:
    """Say on the first rank, once per process and dictionary, what holds when weights are loaded again."""
    from vllm.distributed import get_tensor_model_parallel_rank

    dictionary = setup.dictionary()
    if dictionary is not None and get_tensor_model_parallel_rank() == 0:
        logger.info(
            "LEXICO: weights were loaded again; codes go on with the dictionary of %s, which fits any weights of this "
            "shape, but loses more the further they move from those that it was trained on; reset the prefix cache, "
            "which has keys and values of the old ones",
            dictionary.info.model_name,
        )


def _cache_specs(
    setup: LexicoSetup, layout: CodeLayout, spec: AttentionSpec, vllm_config: Any
) -> tuple[dict[Any, dict[str, Any]], dict[str, Any]]:
    """What each coded layer's two groups have as cache specs, by name, and what each other layer has.

    A layer's own `get_kv_cache_spec` no longer says what its group has: vLLM 0.33 has put the smallest group's block
    size into the configuration since.
    """
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    from vllm_lexico.serve.tail_pages import TAIL_SUFFIX, tail_spec

    layers, tail = vllm_config.compilation_config.static_forward_context, tail_spec(setup, layout, spec.dtype)
    coded: dict[Any, dict[str, Any]] = {}
    others = {}
    for name, layer in layers.items():
        if f"{name}{TAIL_SUFFIX}" in layers:
            coded[layer] = {name: spec, f"{name}{TAIL_SUFFIX}": tail}
        elif isinstance(layer, AttentionLayerBase) and not name.endswith(TAIL_SUFFIX):
            others[name] = layer.get_kv_cache_spec(vllm_config)
    return coded, {name: one for name, one in others.items() if one is not None}
