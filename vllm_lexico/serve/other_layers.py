"""The layers that LEXICO leaves to vLLM: those whose cache does not grow with the context.

Layers with a sliding window, or with attention within chunks, keep the backend that vLLM takes for them without
LEXICO, and raw tokens. Their pages come out of the same pool as code pages, so they have as many bytes as these: a page
holds as many raw tokens as fit. Left to itself vLLM would enlarge blocks of codes to the bytes of the others' pages.

Layers that keep a state (Mamba, linear attention, convolutions) need one that is far larger than a page. There a block
of the pool has the code pages of all layers, one beside the other, or the states of one or more layers, and is about as
large as a state; vLLM calls this a layout with the block outermost. So a block of codes has some hundreds of tokens, as
without LEXICO, and not the tens of thousands whose codes of one layer are as large as a state.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from lexico_kernels import CodeLayout
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

from vllm_lexico import NAME
from vllm_lexico.compat import layers as compat_layers
from vllm_lexico.dictionary.coded_layers import coded_layers, state_layers
from vllm_lexico.errors import either
from vllm_lexico.serve import refusals, state_blocks
from vllm_lexico.serve.setup import LexicoSetup
from vllm_lexico.serve.tail_layer import LexicoTail
from vllm_lexico.serve.tail_pages import tail_spec

SLIDING_WINDOW = "sliding_window"  # what vLLM calls the kind of a layer with one
# Tokens of the smallest pages that vLLM's own backends read.
SMALLEST_PAGE_ON_CPU, SMALLEST_PAGE = 32, state_blocks.SMALLEST_PAGE


def some_are_left(model: Any) -> bool:
    """Whether a model (vLLM's `ModelConfig`) has attention of other kinds than the one whose cache grows."""
    text = model.hf_text_config
    return len(coded_layers(text)) < text.num_hidden_layers


def leave(vllm_config: Any) -> None:
    """Have vLLM choose the backend of the layers that are not coded, and code pages large enough for their tokens.

    Args:
        vllm_config: of an engine whose backend is LEXICO; changed.

    Raises:
        ValueError: no page of codes would hold a page of theirs.
    """
    attention, cache = vllm_config.attention_config, vllm_config.cache_config
    compat_layers.let_vllm_keep_its_layers()
    model = vllm_config.model_config
    if not some_are_left(model) and not model.is_hybrid and not refusals.drafts_have_layers(vllm_config):
        return
    if getattr(attention.backend, "name", None) == NAME:
        attention.backend_per_kind.setdefault(SLIDING_WINDOW, None)
    given = cache.block_size if getattr(cache, "user_specified_block_size", False) else None
    setup = LexicoSetup.of(vllm_config)
    if setup.beside_states:
        block_tokens = block_beside_states(setup, vllm_config, compat_layers.state_bytes(vllm_config), given)
        if cache.mamba_cache_mode == "align":
            _hit_whole_blocks(cache, block_tokens, setup.layout(model.get_head_size(), 1, block_tokens, model.dtype))
    elif some_are_left(model):
        block_tokens = fitting_block(setup, model, given)
    else:  # named, so that vLLM asks the backend of the drafts whether it reads them
        block_tokens = given or refusals.DEFAULT_BLOCK_SIZE
    if block_tokens != given:
        cache.block_size, cache.user_specified_block_size = block_tokens, True


def _hit_whole_blocks(cache: Any, block_tokens: int, layout: CodeLayout) -> None:
    """Have prefix-cache hits end at whole blocks of codes, and states be kept there.

    Beside states vLLM takes hits inside of blocks, where codes may be missing, if the pages of every other group are
    one unit or may be cut. A tail page may not, so the unit is half of one, or a smaller one that the user asks for.
    """
    cache.mamba_block_size = block_tokens
    if getattr(cache, "prefix_match_unit", None) in (None, layout.tail_tokens):
        cache.prefix_match_unit = max(layout.tail_tokens // 2, 1)


def fitting_block(setup: LexicoSetup, model: Any, given: int | None) -> int:
    """Tokens of a code page with room for the smallest page of other layers, whose heads are as large and as many.

    Args:
        setup: of the engine.
        model: vLLM's `ModelConfig`.
        given: by the user, or None.

    Raises:
        ValueError: there is none.
    """
    least = SMALLEST_PAGE_ON_CPU if current_platform.is_cpu() else SMALLEST_PAGE
    sizes = refusals.FITTING_BLOCK_SIZES if given is None else (given,)
    for block_tokens in sizes:
        layout = setup.layout(model.get_head_size(), 1, block_tokens, model.dtype)
        if layout.tail_tokens >= least:
            return block_tokens
    reason = (
        f"blocks of {either(sizes)} tokens, coded in {layout.ratio:.2%} of their bytes, have no room for {least} raw "
        "tokens, which this model's layers with windows or chunks ask for; raise the sparsity"
    )
    raise ValueError(refusals.as_sentence([reason if given is None else f"{reason}, or leave --block-size out"]))


def block_beside_states(setup: LexicoSetup, vllm_config: Any, state_bytes: int, given: int | None) -> int:
    """Tokens of a code page with which a request of the longest length takes hardly more of the pool than with any.

    Args:
        setup: of the engine.
        vllm_config: of the same.
        state_bytes: of a layer that keeps a state, on a rank.
        given: by the user, or None.

    Raises:
        ValueError: what the user gave would leave more than half of a block empty, and vLLM enlarges such blocks; or
            prompts would wait until nothing decodes, see `state_blocks.leaves_room`.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = -(-len(state_layers(model.hf_text_config)) // parallel.pipeline_parallel_size)
    aligned = vllm_config.cache_config.mamba_cache_mode == "align"
    kept = state_blocks.States(layers, state_bytes, 1 + aligned + vllm_config.num_speculative_tokens)
    heads = model.get_num_kv_heads(parallel)

    def count(block_tokens: int) -> state_blocks.StateBlocks:
        layout = setup.layout(model.get_head_size(), heads, block_tokens, model.dtype)
        tail = tail_spec(setup, layout, model.dtype)
        tail_pages = tail.max_admission_blocks_per_request(vllm_config.max_in_flight_tokens, model.max_model_len)
        return state_blocks.count_blocks(layout, setup.beside_states, kept, model.max_model_len, tail_pages)

    scheduler = vllm_config.scheduler_config
    step_tokens = (scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens) if aligned else 0
    counted = {size: count(size) for size in refusals.STATE_BLOCK_SIZES}
    raw_token_bytes = 2 * model.get_head_size() * heads * model.dtype.itemsize
    best = state_blocks.block_tokens(
        counted, state_blocks.plain_block_tokens(state_bytes, raw_token_bytes), step_tokens
    )
    if given is None:
        return best
    layout = setup.layout(model.get_head_size(), heads, given, model.dtype)
    if 2 * layout.page_bytes * setup.beside_states < state_bytes:
        reason = f"--block-size {given} is too small beside states of {state_bytes:,} bytes; leave it out for {best}"
        raise ValueError(refusals.as_sentence([reason]))
    decoding = scheduler.max_num_seqs * (1 + vllm_config.num_speculative_tokens)
    if not state_blocks.leaves_room(given, step_tokens) and step_tokens < given + decoding:
        flag = "scheduled" if scheduler.max_num_scheduled_tokens else "batched"
        reason = (
            f"--block-size {given} leaves no room for what decodes in steps of {step_tokens} tokens, so prompts would "
            f"wait for it to end; leave it out for {best}, or raise --max-num-{flag}-tokens to {2 * given}"
        )
        raise ValueError(refusals.as_sentence([reason]))
    return given


def share_pages(layers: dict[str, Any], tail: LexicoTail) -> None:
    """Have every layer that is not LEXICO's ask for pages of the bytes of a code page.

    Args:
        layers: vLLM's `static_forward_context`: attention layers and others, by name.
        tail: the shadow of any layer that is coded.
    """
    for name, layer in layers.items():
        keeps = isinstance(layer, AttentionLayerBase) and not isinstance(layer, LexicoTail)
        if keeps and layer.get_attn_backend().get_name() != NAME:
            compat_layers.change_cache_spec(layer, functools.partial(_shared, name, layer, tail))
            if tail.setup.packs_blocks:
                compat_layers.let_cpu_read_blocks(layer)


def _shared(name: str, layer: Any, tail: LexicoTail, spec: Any, vllm_config: Any) -> Any:
    """A layer's cache spec with pages of the bytes of a code page; None where it keeps nothing."""
    if isinstance(spec, MambaSpec):  # a block of its own, so that it needs no padding
        block_tokens = tail.layout(vllm_config).block_tokens
        block_tokens = block_tokens if spec.mamba_cache_mode == "align" else spec.block_size
        spec = dataclasses.replace(spec, block_size=block_tokens, page_size_padded=None)
        return compat_layers.without_states_inside(spec) if current_platform.is_cpu() else spec
    if spec is None:
        return None
    return fitted(spec, layer.get_attn_backend(), tail.layout(vllm_config).page_bytes, name)


def fitted(spec: Any, backend: Any, page_bytes: int, name: str) -> Any:
    """A cache spec of raw tokens with pages of `page_bytes`, as full as can be.

    Args:
        spec: vLLM's, of any size of block.
        backend: the layer's, which says what blocks it reads.
        page_bytes: of a code page.
        name: of the layer.

    Raises:
        ValueError: not even the backend's smallest block fits, or the layer keeps something else than tokens.
    """
    if not isinstance(spec, AttentionSpec):
        reason = f"layer {name} keeps a {type(spec).__name__}, which is not supported; {refusals.OTHER_BACKEND}"
        raise ValueError(refusals.as_sentence([reason]))
    token_bytes = dataclasses.replace(spec, block_size=1, page_size_padded=None).page_size_bytes
    room = page_bytes // token_bytes
    sizes = [size for size in _powers_of_two(room) if reads(backend, spec, size)]
    if not sizes:
        reason = (
            f"a page of codes has room for {room} raw tokens of layer {name}, too few for {backend.get_name()}; "
            f"raise the sparsity, or start with --block-size {refusals.FITTING_BLOCK_SIZES[-1]}"
        )
        raise ValueError(refusals.as_sentence([reason]))
    padded = page_bytes if sizes[-1] * token_bytes < page_bytes else None
    return dataclasses.replace(spec, block_size=sizes[-1], page_size_padded=padded)


def _powers_of_two(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length())]


def reads(backend: Any, spec: Any, size: int) -> bool:
    """Whether a backend reads blocks of this size whole."""
    allowed = backend.get_supported_kernel_block_sizes(spec)
    return any(size % one.base == 0 if isinstance(one, MultipleOf) else size == one for one in allowed)
