"""The shadow layer of an attention layer: through it vLLM allocates the tail pages, as a cache group of their own."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from lexico_kernels import CodeLayout
from torch import nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_lexico import NAME
from vllm_lexico.serve.coding_plan import PlanHandover
from vllm_lexico.serve.metadata import BLOCK_LAYOUTS, PAGE_LAYOUTS, LexicoTailMetadataBuilder
from vllm_lexico.serve.setup import LexicoSetup
from vllm_lexico.serve.tail_pages import TAIL_SUFFIX, LexicoTailSpec, tail_spec


class LexicoTailBackend(AttentionBackend):
    """The backend of shadow layers. It names their builder; nothing attends through it."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return f"{NAME}_TAIL"

    @staticmethod
    def get_impl_cls() -> Any:
        return AttentionImpl

    @staticmethod
    def get_builder_cls() -> type[LexicoTailMetadataBuilder]:
        return LexicoTailMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Whatever the attention layers' backend takes."""
        return PAGE_LAYOUTS + BLOCK_LAYOUTS


class LexicoTail(nn.Module, AttentionLayerBase):
    """Shadow layer that owns the tail pages of one attention layer.

    Attributes:
        kv_cache: the pages, once vLLM has allocated them.
        handover: what the metadata builders of all layers share.
        block_tokens: P, of the engine's configuration when pages were planned.
    """

    def __init__(self, layer: Any, setup: LexicoSetup, handover: PlanHandover) -> None:
        super().__init__()
        self.num_kv_heads, self.head_size, self.dtype = layer.num_kv_heads, layer.head_size, layer.kv_cache_torch_dtype
        self.setup, self.handover = setup, handover
        self.kv_cache = torch.tensor([])
        self.block_tokens: int | None = None

    def get_attn_backend(self) -> type[LexicoTailBackend]:
        return LexicoTailBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> LexicoTailSpec:
        """Raw pages of exactly the bytes of a code page, so that both groups draw from one pool."""
        return tail_spec(self.setup, self.layout(vllm_config), self.dtype)

    def layout(self, vllm_config: Any) -> CodeLayout:
        """The layout of the layer's codes."""
        # vLLM 0.33 puts the smallest group's block size into the configuration once pages are planned.
        if self.block_tokens is None:
            self.block_tokens = vllm_config.cache_config.block_size
        return self.setup.layout(self.head_size, self.num_kv_heads, self.block_tokens, self.dtype)


def add_tail_layer(name: str, layer: Any, setup: LexicoSetup, layers: dict[str, Any]) -> str:
    """Put a shadow layer beside an attention layer, unless it is there, and return its name.

    Args:
        name: of the attention layer.
        layer: the attention layer.
        setup: of the engine.
        layers: vLLM's `static_forward_context`, every layer by name.
    """
    tail_name = f"{name}{TAIL_SUFFIX}"
    if tail_name not in layers:
        shared = next((other.handover for other in layers.values() if isinstance(other, LexicoTail)), None)
        layers[tail_name] = LexicoTail(layer, setup, shared or PlanHandover())
    return tail_name
