"""Every kernel that a step can launch, launched once before the engine says that it is ready.

vLLM compiles the kernels that were registered with it when pages are allocated, before it captures CUDA graphs; not
where the user starts it eagerly. Launching is the surest way to compile what launching needs: the functions of a step
are called here with tables of block 0, which is never written, and with nothing to code. Which variants of a kernel
there are follows from a layer's sizes, and within them from how many tokens a launch has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lexico_kernels import LayerCache, RequestTables, ops
from lexico_kernels.device.launch import CLUSTER_VECTORS, LAYERS, LOOKUP_BINS, PURSUIT, STREAM_VECTORS
from lexico_kernels.memory.layout import SPAN_TOKENS
from lexico_kernels.sparse_decode.lookup_sizes import MAX_QUERIES
from torch import Tensor
from vllm.model_executor.warmup.jit_warmup import VllmJitKernel
from vllm.utils.math_utils import cdiv
from vllm.v1.worker.block_table import get_block_table_width

from vllm_lexico.serve import decode_plan
from vllm_lexico.serve.block_plan import BlockPlan, plan_blocks
from vllm_lexico.serve.coding_plan import max_coded_tokens
from vllm_lexico.serve.layer_parts import LayerParts, stacked
from vllm_lexico.serve.prefill_plan import PrefillPlan, history_tokens, plan_prefill

if TYPE_CHECKING:
    from vllm_lexico.serve.impl import LexicoImpl

# Tokens of a step from which on `sparse_decode` is launched in another way, whatever power of two its rows are of.
ROWS = [1 << bit for bit in range(MAX_QUERIES.bit_length())]
DECODED_TOKENS = sorted({1} | {bins.max_columns // row + 1 for bins in LOOKUP_BINS[:-1] for row in ROWS})


class Layer(NamedTuple):
    """A layer to be warmed up: its implementation, its pages, and tables of one request that has none."""

    impl: LexicoImpl
    cache: LayerParts
    tables: RequestTables

    def vectors(self, num_tokens: int, num_heads: int) -> Tensor:
        """Zeros [T, heads, D] in the model's dtype."""
        return self.cache.whole.tail_pages.new_zeros((num_tokens, num_heads, self.impl.head_size))

    def batch(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        heads = self.impl.num_heads, self.impl.num_kv_heads, self.impl.num_kv_heads
        query, key, value = (self.vectors(num_tokens, count) for count in heads)
        return query, key, value


def nowhere(num_jobs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A list for `omp_encode` with nothing to be coded."""
    source = torch.full((num_jobs,), -1, dtype=torch.int32, device=device)
    return source, source.long()


def plan(layer: Layer) -> None:
    """What builders launch for a step in which all requests decode."""
    tables, layout = layer.tables, layer.cache.whole.layout
    starts = torch.tensor([0, 1], dtype=torch.int32, device=tables.sink_end.device)
    batch, kept = (starts, tables.sink_end), decode_plan.PlanBuffers(1, 1, starts.device).of_step(1, 1)
    decode_plan.plan_codes(*batch, tables.block_table, block_tokens=layout.block_tokens, out=kept)
    coded, found = (kept.request, kept.position), (torch.empty_like(kept.request), torch.empty_like(starts[:1]))
    decode_plan.plan_tail(*batch, tables.tail_block_table, *coded, *found, *layer.impl.setup.tail_reach(layout))


def write(layer: Layer) -> None:
    """What every step's layers begin with."""
    _, key, value = layer.batch(1)
    layer.cache.write_tail(key, value, torch.full((1,), -1, device=key.device))


def code_batches(layer: Layer) -> None:
    """Steps with prefill code each layer, small ones and large ones by other launches."""
    limits = [0, CLUSTER_VECTORS, STREAM_VECTORS - 1, *(row.max_vectors for row in PURSUIT[:-1])]
    heads = {part.cache.layout.num_kv_heads for part in layer.cache.parts}
    for tokens in sorted({limit // (2 * count) + 1 for limit in limits for count in heads}):
        _, key, value = layer.batch(tokens)
        entries = nowhere(cdiv(tokens, SPAN_TOKENS) * SPAN_TOKENS, key.device)
        layer.cache.omp_encode(key, value, *entries, relative_error=layer.impl.setup.config.relative_error)


def code_layers(layer: Layer) -> None:
    """Steps of decode code all layers at once, from short lists of jobs and from the longest."""
    impl = layer.impl
    requests = impl.vllm_config.scheduler_config.max_num_seqs
    longest = max_coded_tokens(requests * (1 + impl.setup.num_draft_tokens), requests)
    for stack in stacked(layer.cache.caches_to_stack()):
        for jobs in sorted({2 * max(LAYERS.cluster_tokens, SPAN_TOKENS), longest}):
            entries = nowhere(jobs, stack.addresses.device)
            ops.omp_encode_layers(stack, *entries, relative_error=impl.setup.config.relative_error)


def decode(layer: Layer) -> None:
    """Requests that decode."""
    impl = layer.impl
    scheduler = impl.vllm_config.scheduler_config
    for tokens in DECODED_TOKENS:
        if tokens > scheduler.max_num_seqs * (1 + impl.setup.num_draft_tokens):
            break
        query = layer.vectors(tokens, impl.num_heads)
        request, seq_len = torch.zeros(2, tokens, dtype=torch.int32, device=query.device)
        step = layer.cache, layer.tables, request.clone(), seq_len.clone()
        impl.attend_decode(query, *step, torch.empty_like(query))


def prefill(layer: Layer) -> None:
    """Requests in prefill: a token of its own chunk, and what came before it, raw and coded."""
    batch = layer.batch(1)
    layer.impl.attend_prefill(*batch, layer.cache, layer.tables, _plan(layer), torch.empty_like(batch[0]))


def _plan(layer: Layer) -> PrefillPlan | BlockPlan:
    impl, cache = layer.impl, layer.cache
    setup, most, pages = impl.setup, impl.vllm_config.model_config.max_model_len, cache.whole.tail_pages
    tile_tokens, device = history_tokens(impl.num_kv_heads, impl.head_size, pages.dtype), pages.device
    if not setup.same_answers:
        return plan_prefill([1], [min(2, most)], 0, tile_tokens, device)
    reach = setup.reach(cache.whole.layout)
    far = reach.sink_end + reach.window_tokens + reach.tail_tokens + 2 * reach.block_tokens
    return plan_blocks([1], [min(far, most)], 0, reach, tile_tokens, device)


LAUNCHES: tuple[Callable[[Layer], None], ...] = (plan, write, code_batches, code_layers, decode, prefill)


def tables_of_nothing(cache: LayerCache, max_model_len: int) -> RequestTables:
    """Tables of one request with no page, as wide as the runner's."""
    layout, device = cache.layout, cache.code_pages.device
    sizes = layout.block_tokens, layout.tail_tokens
    widths = [get_block_table_width(cdiv(max_model_len, size), size) for size in sizes]
    tables = [torch.zeros((1, width), dtype=torch.int32, device=device) for width in widths]
    bounds = [torch.zeros(1, dtype=torch.int32, device=device) for _ in range(2)]
    return RequestTables(tables[0], tables[1], bounds[0], bounds[1])


@dataclass(frozen=True)
class Kind:
    """A layer, equal to those for which the same is compiled.

    Attributes:
        layer: the layer.
        sizes: what decides what is compiled for it.
    """

    layer: Layer = field(compare=False)
    sizes: tuple[Any, ...]

    @classmethod
    def of(cls, layer: Layer) -> Kind:
        """Compare by types, sizes and alignments."""
        impl = layer.impl
        parts = [_sizes(part.cache) for part in layer.cache.parts]
        sinks = impl.sinks is not None and (impl.sinks.dtype, impl.sinks.data_ptr() % 16)
        return cls(layer, (impl.num_heads, impl.soft_cap, sinks, layer.cache.order is None, *parts))


def _sizes(cache: LayerCache) -> tuple[Any, ...]:
    """Types, sizes and alignments of a part's pages and codebooks."""
    pages = [(part.dtype, part.stride(0), part.data_ptr() % 16) for part in (cache.code_pages, cache.tail_pages)]
    books = [
        (tensor.dtype, tensor.shape, tensor.data_ptr() % 16)
        for book in (cache.key, cache.value)
        for tensor in (*book.tensors, book.atoms if book.fp8_atoms is None else book.fp8_atoms)
    ]
    return cache.layout, *pages, *books


class _Kernels(VllmJitKernel[Kind]):
    """What vLLM's registry knows: a name for all that a layer launches."""

    CompileKey = Kind

    def get_warmup_keys(self, bind: Callable[[], Layer | None]) -> list[Kind]:
        """The layer that `bind` gives; none where it has no pages."""
        layer = bind()
        return [] if layer is None else [Kind.of(layer)]

    @torch.inference_mode()
    def compile(self, compile_key: Kind) -> None:
        """Launch all that layers of a kind can."""
        for launch in LAUNCHES:
            launch(compile_key.layer)


@functools.cache
def _kernels() -> _Kernels:
    return _Kernels()


def register(bind: Callable[[], Layer | None]) -> None:
    """Have a layer's kernels launched once when vLLM warms up; without effect where it does not.

    Args:
        bind: called then, gives the layer, or None if it has no pages.
    """
    _kernels().register_warmup(bind)
