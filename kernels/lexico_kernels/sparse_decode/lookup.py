"""sparse_decode of "packed16" codes through lookups: no vector is rebuilt.

With q . atom of every atom at hand, a key's score is a few look-ups; values are added up atom by atom, in bins, and
multiplied with the atoms once. Four steps: lookups and, beside them, the raw tail, in Triton (`lookup_triton.py`);
codes, split by split, and the bins times the atoms, in CUDA C++ (`lookup.cu`, `multiply_bins.cu`); all of it merged by
log-sum-exp, in Triton (`lookup_merge.py`). Grids follow from shapes, and what is done for a token follows from its own
context alone: a CUDA graph can hold it, and a token's result is the same in every batch. Scratch is bounded: many
tokens are taken in slices.
"""

from functools import cache as once

import torch
import triton
from torch import Tensor

from lexico_kernels.device import nvrtc
from lexico_kernels.device.arguments import Book, Pages, Rows, Sizes, Tables
from lexico_kernels.device.launch import (
    LOOKUP_MATMUL,
    LOOKUP_SPLITS,
    LOOKUP_TAIL,
    fitting_atoms,
    lookup_launch,
)
from lexico_kernels.device.overlap import launch_options, overlap_on
from lexico_kernels.memory import records
from lexico_kernels.memory.pages import LayerCache, RequestTables
from lexico_kernels.sparse_decode import lookup_merge, lookup_triton
from lexico_kernels.sparse_decode.lookup_merge import MergeTiles
from lexico_kernels.sparse_decode.lookup_sizes import (
    BinsWay,
    Shape,
    bins_constants,
    bins_shared_bytes,
    bins_way,
    constants,
    power_of_two,
    shape_for,
    shared_bytes,
)
from lexico_kernels.sparse_decode.lookup_triton import Heads, Lookups, LookupTiles, Partial
from lexico_kernels.sparse_decode.softmax import LOG2_E

PRIMITIVES = "sparse_decode/lookup_primitives.cu"
FILES = (PRIMITIVES, records.FILE, "sparse_decode/lookup_records.cu", "sparse_decode/lookup.cu")
BINS_FILES = (PRIMITIVES, "sparse_decode/multiply_bins.cu")
DTYPES = {torch.float16, torch.bfloat16}


@once
def shared_limit_bytes(device: int) -> int:
    """Shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def shape_of(query: Tensor, cache: LayerCache, tables: RequestTables, soft_cap: float = 0.0) -> Shape | None:
    """The shape for a step."""
    max_tokens = tables.block_table.shape[1] * cache.layout.block_tokens
    atoms, limit = (cache.key.num_atoms, cache.value.num_atoms), shared_limit_bytes(query.device.index)
    return shape_for(cache.layout, query.shape[1], *atoms, max_tokens, limit, soft_cap * LOG2_E)


def supports(query: Tensor, cache: LayerCache, tables: RequestTables) -> bool:
    """Whether this device, these types and this codec go through lookups."""
    if (
        cache.layout.codec != "packed16"
        or not {query.dtype, cache.value.atoms.dtype} <= DTYPES
        or not nvrtc.available(query.device.index)
    ):
        return False
    return shape_of(query, cache, tables) is not None


@once
def kernel_for(shape: Shape, device: int, overlap: bool) -> nvrtc.Kernel:
    """`attend_codes`, compiled for a shape."""
    shared = shared_bytes(shape.queries, shape.key_atoms, shape.value_atoms, shape.way)
    macros = constants(shape, shared_limit_bytes(device), overlap)
    return nvrtc.kernel(FILES, "attend_codes", device, shared, **macros)


@once
def bins_kernel_for(shape: Shape, way: BinsWay, half: bool, device: int, overlap: bool) -> nvrtc.Kernel:
    """`multiply_bins`, compiled for a shape; half: atoms are float16, not bfloat16."""
    shared = bins_shared_bytes(shape, way)
    macros = bins_constants(shape, way, half, overlap)
    return nvrtc.kernel(BINS_FILES, "multiply_bins", device, shared, **macros)


def sparse_decode(
    query: Tensor,
    cache: LayerCache,
    tables: RequestTables,
    token_request: Tensor,
    token_seq_len: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.sparse_decode`, where `supports` says so. Scratch: of `Shape.slice_tokens` tokens."""
    T, Hq, _ = query.shape
    out = torch.empty_like(query) if out is None else out
    lse = torch.empty(T, Hq, dtype=torch.float32, device=query.device)
    shape = shape_of(query, cache, tables, soft_cap)
    assert shape is not None, "supports() says no"
    step = min(T, shape.slice_tokens())
    scratch = {
        name: torch.empty(step * count, dtype=dtype, device=query.device)
        for name, (count, dtype) in shape.scratch().items()
    }
    for first in range(0, T, max(step, 1)):
        rows = slice(first, first + step)
        request, seq_len = token_request[rows], token_seq_len[rows]
        prepare(shape, scratch, query[rows], cache, tables, request, seq_len, scale * LOG2_E)
        attend_codes(shape, scratch, cache, tables, request)
        multiply_bins(shape, scratch, cache, len(request))
        merge(shape, scratch, cache, out[rows], lse[rows], sinks)
    return out, lse


@once
def _heads(shape: Shape) -> Heads:
    return Heads(shape.way.passes, shape.queries, shape.row, shape.group)


def _size(shape: Shape) -> int:
    """Of heads, in those of up to 128; of larger ones less is taken at a time, to fit registers and shared memory."""
    return max(1, power_of_two(shape.layout.head_dim) // 128)


@once
def _lookup_tiles(shape: Shape, overlap: bool) -> LookupTiles:
    return LookupTiles(
        COLUMNS=max(LOOKUP_MATMUL.columns, shape.row),
        ATOMS=fitting_atoms(LOOKUP_MATMUL.tile, power_of_two(shape.layout.head_dim), torch.half.itemsize),
        TILES=max(1, LOOKUP_MATMUL.tiles // _size(shape)),
        SPLIT=shape.way.tokens,
        SHORT_SPLIT=min(LOOKUP_SPLITS.short_tokens, shape.way.tokens),
        SHORT_CONTEXT=LOOKUP_SPLITS.short_context,
        TAIL_SPLITS=LOOKUP_TAIL.splits,
        TAIL=LOOKUP_TAIL.tile,
        CAP=shape.cap,
        OVERLAP=overlap,
    )


@once
def _merge_tiles(shape: Shape, overlap: bool) -> MergeTiles:
    return MergeTiles(
        SPLITS_PAD=triton.next_power_of_2(shape.max_splits),
        CHUNKS=shape.chunks,
        CHUNKS_PAD=triton.next_power_of_2(shape.chunks),
        TAIL_SPLITS=LOOKUP_TAIL.splits,
        CAPPED=shape.cap > 0,
        OVERLAP=overlap,
    )


def prepare(
    shape: Shape,
    scratch: dict[str, Tensor],
    query: Tensor,
    cache: LayerCache,
    tables: RequestTables,
    token_request: Tensor,
    token_seq_len: Tensor,
    factor: float,
) -> None:
    """Lookups, scales and schedules of all tokens, and attention over sinks and window."""
    T, overlap = query.shape[0], overlap_on(query)
    tiles = _lookup_tiles(shape, overlap)
    programs = triton.cdiv(shape.key_atoms, tiles.ATOMS * tiles.TILES) * triton.cdiv(T * shape.row, tiles.COLUMNS)
    lookup_triton.prepare[(shape.token_passes * (programs + T * tiles.TAIL_SPLITS),)](
        Rows.of(query),
        Book(*cache.key.tensors),
        Pages.tail(cache),
        Tables.of(tables),
        token_request,
        token_seq_len,
        Lookups(scratch["lookup"], scratch["query_scale"], scratch["offset"], scratch["schedule"]),
        Partial(scratch["tail_out"], scratch["tail_lse"]),
        factor,
        T,
        shape.token_passes,
        SIZES=Sizes.of(cache, records=False),
        HEADS=_heads(shape),
        TILES=tiles,
        num_warps=LOOKUP_MATMUL.num_warps,
        **launch_options(overlap),
    )


def attend_codes(
    shape: Shape, scratch: dict[str, Tensor], cache: LayerCache, tables: RequestTables, token_request: Tensor
) -> None:
    """Bins and statistics of every split."""
    pages, overlap = cache.code_pages, overlap_on(cache.code_pages)
    kernel_for(shape, pages.device.index, overlap).launch(
        (shape.max_splits, token_request.shape[0] * shape.token_passes, 1),
        lookup_launch(shape.queries).threads,
        scratch["schedule"],
        token_request,
        tables.block_table,
        tables.block_table.stride(0),
        pages,
        nvrtc.Int64(pages.stride(0)),
        scratch["lookup"],
        scratch["query_scale"],
        cache.key.levels,
        cache.value.levels,
        scratch["bins"],
        scratch["stats"],
        shape.token_passes,
        *([scratch["offset"]] if shape.cap else []),
        overlaps=overlap,
    )


def multiply_bins(shape: Shape, scratch: dict[str, Tensor], cache: LayerCache, num_tokens: int) -> None:
    """Merged bins times atoms, a share of the atoms at a time."""
    atoms, overlap = cache.value.atoms, overlap_on(cache.code_pages)
    way = bins_way(shape, num_tokens, shared_limit_bytes(atoms.device.index))
    blocks = triton.cdiv(num_tokens * shape.row, way.columns)
    kernel = bins_kernel_for(shape, way, atoms.dtype == torch.float16, atoms.device.index, overlap)
    kernel.launch(
        (shape.chunks, shape.token_passes * blocks, 1),
        way.threads,
        scratch["schedule"],
        scratch["bins"],
        scratch["stats"],
        atoms,
        nvrtc.Int64(cache.value.head_stride),
        scratch["chunk_out"],
        num_tokens,
        shape.max_splits,
        shape.token_passes,
        overlaps=overlap,
    )


def merge(
    shape: Shape, scratch: dict[str, Tensor], cache: LayerCache, out: Tensor, lse: Tensor, sinks: Tensor | None = None
) -> None:
    """Codes and tail into out and lse."""
    overlap = overlap_on(out)
    lookup_merge.merge[(out.shape[0], shape.num_heads)](
        scratch["chunk_out"],
        scratch["schedule"],
        scratch["stats"],
        scratch["offset"],
        Book(*cache.value.tensors),
        Partial(scratch["tail_out"], scratch["tail_lse"]),
        sinks,
        Rows.of(out),
        lse,
        shape.max_splits,
        SIZES=Sizes.of(cache, records=False),
        HEADS=_heads(shape),
        TILES=_merge_tiles(shape, overlap),
        num_warps=LOOKUP_TAIL.merge_warps,
        **launch_options(overlap),
    )
