"""Where vLLM enters: the backend that it selects by name.

A layer has two kinds of pages. Its own cache group holds codes; a shadow layer beside it (`tail_layer.py`) owns the
tail, the tokens in full precision. `metadata.py` has the builders of both groups, `impl.py` does the attention.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_lexico import NAME, last_word
from vllm_lexico.serve import refusals
from vllm_lexico.serve.impl import LexicoImpl
from vllm_lexico.serve.metadata import BLOCK_LAYOUTS, PAGE_LAYOUTS, LexicoMetadataBuilder
from vllm_lexico.serve.setup import LexicoSetup


class LexicoBackend(AttentionBackend):
    """Attention over a sparsely coded KV cache (Lexico, arXiv 2412.08890)."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    setup: ClassVar[LexicoSetup | None] = None  # set in the subclass that a loaded layer gets, see `bound_to`

    @classmethod
    @functools.cache
    def bound_to(cls, setup: LexicoSetup | None) -> type[LexicoBackend]:
        """This backend for layers of one engine: `customize_spec` is handed a spec and no configuration."""
        if cls.setup == setup:
            return cls
        return type(
            cls.__name__, (cls,), {"setup": setup, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        )

    @staticmethod
    def get_name() -> str:
        return NAME

    @classmethod
    @last_word.kept()
    def get_impl_cls(cls) -> type[LexicoImpl]:
        """What a layer attends with; a layer that changes the backend for its own kind of attention is refused here."""
        refusals.refuse(refusals.attention_class_refusals(cls, LexicoBackend.bound_to(cls.setup)))
        return LexicoImpl

    @staticmethod
    def get_builder_cls() -> type[LexicoMetadataBuilder]:
        return LexicoMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """What vLLM chooses a default from; once there is a spec, its blocks are never split."""
        return [MultipleOf(refusals.DEFAULT_BLOCK_SIZE if kv_cache_spec is None else 1)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """The engine's own refusals know which of these its model allows; here there may be no setup yet."""
        return block_size is None or block_size in refusals.SUPPORTED_BLOCK_SIZES + refusals.STATE_BLOCK_SIZES

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """A layer's implementation refuses one that binds; vLLM does not say here how long it is."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """A checkpoint may bring them for a cache of its own kind; codes have no use for them."""
        return True

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return refusals.DEFAULT_BLOCK_SIZE

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Beside states and drafts, whose pages are larger, all pages of a block lie together: see `other_layers`."""
        return BLOCK_LAYOUTS if cls.setup is not None and cls.setup.packs_blocks else PAGE_LAYOUTS

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Give a layer's cache spec the bytes of its codes.

        A block of one token is what vLLM asks about when it makes blocks as large as a state. A block has the pages of
        all layers then, so the answer is for all, and twice that: `block_beside_states` fills at least half.
        """
        if cls.setup is None or spec.state_content_bytes is not None:
            return spec
        if spec.block_size == 1:
            layout = cls.setup.layout(spec.head_size, spec.num_kv_heads, refusals.DEFAULT_BLOCK_SIZE, spec.dtype)
            return dataclasses.replace(
                spec, state_content_bytes=layout.cell_bytes * max(2 * cls.setup.beside_states, 1)
            )
        layout = cls.setup.layout(spec.head_size, spec.num_kv_heads, spec.block_size, spec.dtype)
        return dataclasses.replace(spec, state_content_bytes=layout.cell_bytes)

    @classmethod
    def validate_configuration(cls, *args: Any, **kwargs: Any) -> list[str]:
        """Reasons why LEXICO cannot serve a layer, with remedies. vLLM asks in a worker; the user reads them last."""
        reasons = refusals.selector_refusals(kwargs)
        if not reasons:
            generic = super().validate_configuration(*args, **kwargs)
            reasons = [f"{reason}; {refusals.OTHER_BACKEND}" for reason in generic]
        if reasons:
            last_word.say(refusals.as_sentence(reasons))
        return reasons
