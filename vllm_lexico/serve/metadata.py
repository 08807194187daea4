"""What a step's attention needs to know, and the builders that derive it from the runner's tables.

A layer has two kinds of pages, in two cache groups of vLLM. Each group has a builder: the codes group's derives where
codes go and what each token sees, the tail group's where full-precision tokens are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from lexico_kernels import CodeLayout
from lexico_kernels.memory.pages import DecodePlan
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_lexico.serve import coding_plan, decode_plan, refusals, start_line
from vllm_lexico.serve.block_plan import BlockPlan, plan_blocks
from vllm_lexico.serve.later_coding import LaterCoding, most_later_tokens
from vllm_lexico.serve.layer_stack import LayerFinder, LayersOfStep
from vllm_lexico.serve.prefill_plan import PrefillPlan, history_tokens, plan_prefill
from vllm_lexico.serve.setup import LexicoSetup
from vllm_lexico.serve.tail_pages import TAIL_SUFFIX, LexicoTailSpec
from vllm_lexico.serve.wiring import allocation

# Layouts in which a page is one run of bytes. What is inside is ours.
PAGE_LAYOUTS = (KVCacheLayout.LBHNC, KVCacheLayout.LBNHC)
BLOCK_LAYOUTS = (KVCacheLayout.BLHNC, KVCacheLayout.BLNHC)  # in which a block's pages of all layers lie together


@dataclass
class LexicoMetadata(AttentionMetadata):
    """One step, as the codes group sees it. Decode requests come first in the batch.

    Tensors are on the device and persistent, so that a CUDA graph can hold them, but for those of `prefill`.
    """

    layout: CodeLayout
    num_tokens: int
    num_decode_tokens: int
    prefill: PrefillPlan | BlockPlan | None  # of the requests after those that decode
    block_table: Tensor  # int32 [B, pages]
    token_request: Tensor  # int32 [T]
    token_seq_len: Tensor  # int32 [T], positions that a token sees; 0 for padding
    destination: Tensor  # int64 [M], where the codes of the tokens to code go
    layers: LayersOfStep | None  # that one launch codes; None if each layer codes by itself
    later: LaterCoding | None  # what takes the tokens of each layer that the next step is to code


@dataclass
class LexicoTailMetadata(AttentionMetadata):
    """One step, as the tail group sees it."""

    slot_mapping: Tensor  # int64 [T]
    block_table: Tensor  # int32 [B, pages]
    source: Tensor  # int32 [M], where the tokens to code are read
    sink_end: Tensor  # int32 [B]
    raw_start: Tensor  # int32 [B]


class _StepBuffers:
    """Tensors of fixed address for what a builder derives in each step."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        scheduler = vllm_config.scheduler_config
        # A batch that is padded to the size of a CUDA graph may exceed what the scheduler allows.
        padded = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        self.max_requests = max(scheduler.max_num_seqs, padded)
        self.max_tokens = max(scheduler.max_num_batched_tokens, padded)
        self.max_coded = coding_plan.max_coded_tokens(self.max_tokens, self.max_requests)
        self.device = device

    def new(self, count: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(count, dtype=dtype, device=self.device)


def _only_decodes(common: CommonAttentionMetadata, threshold: int) -> bool:
    """Whether every request of a step decodes. Then all tokens that it codes, its own too, are in tail pages."""
    return common.max_query_len <= threshold


class LexicoMetadataBuilder(AttentionMetadataBuilder[LexicoMetadata]):
    """Builds a step's metadata for the layers of the codes group."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: FullAttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        refusals.refuse(refusals.mask_refusals(True, kv_cache_spec.non_causal))
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.setup = LexicoSetup.of(vllm_config)
        self.layout = self.setup.layout(
            kv_cache_spec.head_size, kv_cache_spec.num_kv_heads, kv_cache_spec.block_size, kv_cache_spec.dtype
        )
        shadow = vllm_config.compilation_config.static_forward_context[f"{layer_names[0]}{TAIL_SUFFIX}"]
        allocation.check_codes_group(kv_cache_spec, self.layout, shadow.block_tokens)
        buffers = _StepBuffers(vllm_config, device)
        self._buffers = decode_plan.PlanBuffers(buffers.max_tokens, buffers.max_requests, device)
        self._handover = shadow.handover
        self._finder = LayerFinder(layer_names, vllm_config)
        self._later = LaterCoding(most_later_tokens(self.setup, vllm_config), self.setup.config.relative_error)
        self._reported = False

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LexicoMetadata:
        """Derive where this step's codes go and what each token sees."""
        common = common_attn_metadata
        refusals.refuse(refusals.mask_refusals(common.causal))
        self._later.code()  # before this step's lists take the place of the last one's, and before its layers write
        if not self._reported:
            start_line.log_start(self.setup, self.layout, self.kv_cache_spec, self.vllm_config)
            self._reported = True
        assert self.reorder_batch_threshold is not None
        num_decodes, _, num_decode_tokens, _ = split_decodes_and_prefills(common, self.reorder_batch_threshold)
        only_decodes = _only_decodes(common, self.reorder_batch_threshold)
        plan = self._plan_codes(common, only_decodes)
        waits = not only_decodes and common.num_actual_tokens <= self._later.most_tokens
        return LexicoMetadata(
            layout=self.layout,
            num_tokens=common.num_actual_tokens,
            num_decode_tokens=num_decode_tokens,
            prefill=self._plan_prefill(common, num_decodes) if num_decode_tokens < common.num_actual_tokens else None,
            block_table=common.block_table_tensor,
            token_request=plan.token_request,
            token_seq_len=plan.token_seq_len,
            destination=plan.destination,
            layers=self._finder.of_step(self.layout) if only_decodes else None,
            later=self._later if waits else None,
        )

    def _plan_codes(self, common: CommonAttentionMetadata, only_decodes: bool) -> DecodePlan:
        """Fill this builder's buffers, and leave the tail's builder what it needs."""
        block_table, block_tokens = common.block_table_tensor[: common.num_reqs], self.layout.block_tokens
        kept = self._buffers.of_step(common.num_actual_tokens, common.num_reqs)
        batch = common.query_start_loc, common.seq_lens
        if only_decodes:
            decode_plan.plan_codes(*batch, block_table, block_tokens=block_tokens, out=kept)
            plan = coding_plan.CodingPlan(None, kept.request, kept.position)
        else:
            request, position = coding_plan.locate_tokens(*batch, common.num_actual_tokens)
            plan = coding_plan.plan_coding(request, position, block_table, block_tokens)
            kept.token_request.copy_(request)
            kept.token_seq_len.copy_(position + 1)
            kept.destination.copy_(plan.destinations(block_table, block_tokens))
        self._handover.put(self.layer_names, plan)
        return kept

    def _plan_prefill(self, common: CommonAttentionMetadata, num_decodes: int) -> PrefillPlan | BlockPlan:
        # An upper bound only for requests that decode, whose drafts may yet be rejected.
        seq_lens = common.seq_lens if common.seq_lens.is_cpu else common.seq_lens_cpu_upper_bound
        assert seq_lens is not None
        query_lens = common.query_start_loc_cpu.diff()[num_decodes:].tolist()
        spec = self.kv_cache_spec
        tile_tokens = history_tokens(spec.num_kv_heads, spec.head_size, spec.dtype)
        lengths = query_lens, seq_lens[num_decodes:].tolist()
        if self.setup.same_answers:
            return plan_blocks(*lengths, num_decodes, self.setup.reach(self.layout), tile_tokens, self.device)
        return plan_prefill(*lengths, num_decodes, tile_tokens, self.device)


class LexicoTailMetadataBuilder(AttentionMetadataBuilder[LexicoTailMetadata]):
    """Builds a step's metadata for the shadow layers of the tail group."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: Any, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
        allocation.check_tail_group(kv_cache_spec, layer.get_kv_cache_spec(vllm_config))
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        assert isinstance(kv_cache_spec, LexicoTailSpec)
        self._handover = layer.handover
        self._coded_names = [name.removesuffix(TAIL_SUFFIX) for name in layer_names]
        self._reach = layer.setup.tail_reach(layer.layout(vllm_config))
        buffers = _StepBuffers(vllm_config, device)
        self.sink_end = buffers.new(buffers.max_requests, torch.int32).fill_(self._reach.sink_end)
        self.raw_start = buffers.new(buffers.max_requests, torch.int32)
        self.source = buffers.new(buffers.max_coded, torch.int32)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> LexicoTailMetadata:
        """Derive where this step reads full-precision tokens."""
        common = common_attn_metadata
        plan = self._handover.take(self._coded_names)
        assert self.reorder_batch_threshold is not None
        source, raw_start = self.source[: len(plan.position)], self.raw_start[: len(common.seq_lens)]
        starts, seq_lens, block_table = common.query_start_loc, common.seq_lens, common.block_table_tensor
        # A launch that codes all layers has no layer's batch.
        if _only_decodes(common, self.reorder_batch_threshold):
            batch = starts, seq_lens, block_table, plan.request, plan.position
            decode_plan.plan_tail(*batch, source, raw_start, *self._reach)
        else:
            source.copy_(plan.sources(starts, block_table, self._reach.tail_tokens, from_batch=True))
            raw_start.copy_(coding_plan.raw_starts(starts, seq_lens, block_table, **self._reach._asdict()))
        return LexicoTailMetadata(
            slot_mapping=common.slot_mapping,
            block_table=block_table,
            source=source,
            sink_end=self.sink_end[: common.num_reqs],
            raw_start=raw_start,
        )
