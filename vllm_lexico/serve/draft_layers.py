"""The layers of a model that drafts: they keep vLLM's own backend and raw tokens, and share the blocks of codes.

Drafts are guesses that the model checks, so their cache is small (a layer of EAGLE or MTP) and is left as it is. A
block of the pool has the code pages of all layers of the model and, beside them, a raw page of as many tokens for
each layer that drafts: they are one cache group of vLLM, with one block table and the same prefix-cache hits. vLLM
allows pages of different bytes in a block where the block is the outermost axis of the cache's layout, as beside
layers with states. Left to itself it would give each layer of codes a group of its own, since a group has as many
layers as the smallest.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_lexico import NAME, compat, last_word
from vllm_lexico.compat import layers as compat_layers
from vllm_lexico.serve import other_layers, refusals
from vllm_lexico.serve.tail_layer import LexicoTail


@last_word.kept()
def keep_raw(vllm_config: Any, names: list[str]) -> None:
    """Have the layers of drafts keep raw pages of as many tokens as a code page.

    Args:
        vllm_config: of the engine.
        names: of the layers that loading the drafts has added.

    Raises:
        ValueError: a layer is of a kind that cannot share blocks with codes.
    """
    layers = vllm_config.compilation_config.static_forward_context
    tail = next(layer for layer in layers.values() if isinstance(layer, LexicoTail))
    for name in names:
        layer = layers[name]
        if not isinstance(layer, AttentionLayerBase):
            continue
        if layer.get_attn_backend().get_name() == NAME:
            raise compat.does_not_fit(f"layer {name}, which drafts, got {NAME} for its backend and has no dictionary")
        target = getattr(layer, "kv_sharing_target_layer_name", None)
        if target is not None:
            refusals.refuse([refusals.drafts_share_cache(name, target)])
        compat_layers.change_cache_spec(layer, functools.partial(raw, name, layer, tail))
        compat_layers.let_cpu_read_blocks(layer)
        layer.get_kv_cache_spec(vllm_config)  # refuses it here rather than when vLLM plans pages


def raw(name: str, layer: Any, tail: LexicoTail, spec: Any, vllm_config: Any) -> Any:
    """A draft layer's cache spec with pages of as many tokens as a code page; None where it keeps nothing.

    Where such a page happens to have the bytes of a code page it is padded by a token: vLLM packs pages of different
    bytes into a block, and would make groups of pages that are alike.

    Raises:
        ValueError: it keeps something else than tokens, or its backend does not read such pages whole.
    """
    if spec is None:
        return None
    backend, layout = layer.get_attn_backend(), tail.layout(vllm_config)
    block_tokens = layout.block_tokens
    if not isinstance(spec, AttentionSpec):
        refusals.refuse([refusals.drafts_keep_other(name, type(spec).__name__)])
    spec = dataclasses.replace(spec, block_size=block_tokens)
    if not other_layers.reads(backend, spec, block_tokens):
        refusals.refuse([refusals.drafts_backend(backend.get_name(), block_tokens)])
    if spec.page_size_bytes == layout.page_bytes:
        spec = dataclasses.replace(spec, page_size_padded=layout.page_bytes + layout.page_bytes // block_tokens)
    return spec
