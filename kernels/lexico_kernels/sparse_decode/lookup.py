"""sparse_decode of "packed16" codes through tables: no vector is rebuilt.

With q . atom of every atom at hand, a key's score is a few look-ups; values are added up atom by atom, in bins, and
multiplied with the atoms once. Three steps, the second in CUDA C++ (`lookup.cu`), the others in Triton
(`table_parts.py`): tables and, beside them, the raw tail; codes, part by part; the bins times the atoms. Then all are
merged by their log-sum-exp. Grids follow from shapes, and what is done for a token follows from its own context alone:
a CUDA graph can hold it, and a token's result is the same in every batch. Scratch is bounded: many tokens are taken in
slices.
"""

from functools import cache as once
from math import gcd

import torch
import triton
from torch import Tensor

from lexico_kernels.device import nvrtc
from lexico_kernels.device.launch import TABLE, TABLE_MATMUL, TABLE_TAIL, table_launch
from lexico_kernels.memory.pages import LayerCache, RequestTables
from lexico_kernels.sparse_decode import lookup_triton as table_parts
from lexico_kernels.sparse_decode.lookup_sizes import Shape, constants, shape_for, shared_bytes

LOG2_E = 1.4426950408889634
FILES = ("sparse_decode/lookup_primitives.cu", "sparse_decode/lookup_records.cu", "sparse_decode/lookup.cu")
DTYPES = (torch.float16, torch.bfloat16)


@once
def shared_limit_bytes(device: int) -> int:
    """Shared memory that a block may have."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def shape_of(query: Tensor, cache: LayerCache, tables: RequestTables) -> Shape | None:
    """The shape for a step."""
    max_tokens = tables.block_table.shape[1] * cache.layout.block_tokens
    atoms = cache.key.num_atoms, cache.value.num_atoms
    return shape_for(cache.layout, query.shape[1], *atoms, max_tokens, shared_limit_bytes(query.device.index))


def supports(query: Tensor, cache: LayerCache, tables: RequestTables) -> bool:
    """Whether this device, these types and this codec go through tables."""
    if cache.layout.codec != "packed16" or query.dtype not in DTYPES or not nvrtc.available(query.device.index):
        return False
    return shape_of(query, cache, tables) is not None


@once
def kernel_for(shape: Shape, page_alignment: int, device: int) -> nvrtc.Kernel:
    """`attend_codes`, compiled for a shape."""
    launch = table_launch(shape.group)
    shared = shared_bytes(launch, shape.group, shape.key_atoms, shape.value_atoms)
    macros = constants(shape, launch, page_alignment, shared_limit_bytes(device))
    return nvrtc.kernel(FILES, "attend_codes", device, shared, **macros)


def sparse_decode(
    query: Tensor,
    cache: LayerCache,
    tables: RequestTables,
    token_request: Tensor,
    token_seq_len: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.sparse_decode`, where `supports` says so. Scratch: of `Shape.slice_tokens` tokens."""
    T, Hq, _ = query.shape
    out = torch.empty_like(query) if out is None else out
    lse = torch.empty(T, Hq, dtype=torch.float32, device=query.device)
    shape = shape_of(query, cache, tables)
    assert shape is not None, "supports() says no"
    step = min(T, shape.slice_tokens())
    scratch = {
        name: torch.empty(step * count, dtype=dtype, device=query.device)
        for name, (count, dtype) in shape.scratch().items()
    }
    for first in range(0, T, max(step, 1)):
        rows = slice(first, first + step)
        decode_slice(
            shape,
            scratch,
            query[rows],
            cache,
            tables,
            token_request[rows],
            token_seq_len[rows],
            scale,
            out[rows],
            lse[rows],
        )
    return out, lse


def decode_slice(
    shape: Shape,
    scratch: dict[str, Tensor],
    query: Tensor,
    cache: LayerCache,
    tables: RequestTables,
    token_request: Tensor,
    token_seq_len: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """All steps for tokens that fit the scratch memory."""
    addresses = (token_request, token_seq_len, tables.sink_end, tables.raw_start)
    factor = scale * LOG2_E
    prepare(shape, scratch, query, cache, tables, addresses, factor)
    attend_codes(shape, scratch, cache, tables, token_request)
    multiply_bins(shape, scratch, cache, query.shape[0])
    merge(shape, scratch, cache, out, lse)


def prepare(
    shape: Shape,
    scratch: dict[str, Tensor],
    query: Tensor,
    cache: LayerCache,
    tables: RequestTables,
    addresses: tuple[Tensor, ...],
    factor: float,
) -> None:
    """Tables, scales and plans of all tokens, and attention over sinks and window."""
    D, T = shape.layout.head_dim, query.shape[0]
    tile, columns = TABLE_MATMUL.table_tile, max(TABLE_MATMUL.columns, shape.row)
    tiles = triton.cdiv(shape.key_atoms, tile) * triton.cdiv(T * shape.row, columns)
    table_parts.prepare[(shape.blocks * (tiles + T * TABLE_TAIL.parts),)](
        query,
        query.stride(0),
        query.stride(1),
        cache.key.atoms,
        cache.key.mean,
        cache.key.stretch,
        *addresses,
        scratch["table"],
        scratch["query_scale"],
        scratch["offset"],
        scratch["plan"],
        cache.tail_pages,
        cache.tail_pages.stride(0),
        tables.tail_block_table,
        tables.tail_block_table.stride(0),
        scratch["tail_out"],
        scratch["tail_lse"],
        factor,
        T,
        H=shape.blocks,
        HEAD_STRIDE=cache.key.head_stride,
        HEAD_GROUPS=shape.head_groups,
        N=shape.key_atoms,
        R=shape.layout.tail_tokens,
        D=D,
        D_PAD=triton.next_power_of_2(D),
        G=shape.group,
        G_PAD=16,
        ROW=shape.row,
        COLUMNS=columns,
        SPAN=TABLE.span,
        SHORT_SPAN=TABLE.short_span,
        SHORT=TABLE.short_tokens,
        TILE=tile,
        KV=TABLE_TAIL.parts,
        TAIL_TILE=TABLE_TAIL.tile,
        num_warps=TABLE_MATMUL.num_warps,
    )


def attend_codes(
    shape: Shape, scratch: dict[str, Tensor], cache: LayerCache, tables: RequestTables, token_request: Tensor
) -> None:
    """Bins and statistics of every part."""
    pages = cache.code_pages
    kernel = kernel_for(shape, gcd(pages.data_ptr(), pages.stride(0), 16), pages.device.index)
    kernel.launch(
        (shape.max_parts, token_request.shape[0] * shape.blocks, 1),
        table_launch(shape.group).threads,
        scratch["plan"],
        token_request,
        tables.block_table,
        tables.block_table.stride(0),
        pages,
        nvrtc.Int64(pages.stride(0)),
        scratch["table"],
        scratch["query_scale"],
        cache.key.levels,
        cache.value.levels,
        scratch["bins"],
        scratch["stats"],
        shape.blocks,
    )


def multiply_bins(shape: Shape, scratch: dict[str, Tensor], cache: LayerCache, num_tokens: int) -> None:
    """Merged bins times atoms, a share of the atoms at a time."""
    D, columns = shape.layout.head_dim, max(TABLE_MATMUL.bins_columns, shape.row)
    rows = num_tokens * shape.blocks * shape.row
    table_parts.multiply_bins[(shape.chunks, shape.blocks, triton.cdiv(num_tokens * shape.row, columns))](
        scratch["plan"],
        scratch["bins"],
        scratch["stats"],
        rows * shape.max_parts,
        cache.value.atoms,
        scratch["chunk_out"],
        scratch["coded_lse"],
        num_tokens,
        shape.max_parts,
        HEAD_STRIDE=cache.value.head_stride,
        HEAD_GROUPS=shape.head_groups,
        N=shape.value_atoms,
        D=D,
        D_PAD=triton.next_power_of_2(D),
        G=shape.group,
        ROW=shape.row,
        COLUMNS=columns,
        PARTS_PAD=triton.next_power_of_2(shape.max_parts),
        PARTS_AT_ONCE=TABLE_MATMUL.parts_at_once,
        CHUNK=shape.chunk,
        TILE=TABLE_MATMUL.bins_tile,
        num_warps=TABLE_MATMUL.bins_warps,
    )


def merge(shape: Shape, scratch: dict[str, Tensor], cache: LayerCache, out: Tensor, lse: Tensor) -> None:
    """Codes and tail into out and lse."""
    D = shape.layout.head_dim
    table_parts.merge[(out.shape[0], shape.num_heads)](
        scratch["chunk_out"],
        scratch["coded_lse"],
        scratch["offset"],
        cache.value.mean,
        cache.value.stretch,
        scratch["tail_out"],
        scratch["tail_lse"],
        out,
        out.stride(0),
        out.stride(1),
        lse,
        HEAD_GROUPS=shape.head_groups,
        D=D,
        D_PAD=triton.next_power_of_2(D),
        G=shape.group,
        ROW=shape.row,
        CHUNKS=shape.chunks,
        CHUNKS_PAD=triton.next_power_of_2(shape.chunks),
        TAIL_PARTS=TABLE_TAIL.parts,
        num_warps=TABLE_TAIL.num_warps,
    )
