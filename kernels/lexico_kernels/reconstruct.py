"""reconstruct on CUDA: dense K and V of tokens of any requests."""

import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels.device.arguments import Book, Pages, Rows, Sizes, Tables
from lexico_kernels.device.launch import RECONSTRUCT
from lexico_kernels.device.records import decode_tile, load_of_head, load_raw, page_start
from lexico_kernels.memory.pages import LayerCache, RequestTables


@triton.jit
def _rebuild(out, heads, raw, positions, head, row, coded, written, books, KV: tl.constexpr, SIZES: tl.constexpr):
    """K or V of one tile: decoded where coded, else the raw rows given."""
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    dims = tl.arange(0, D_PAD)
    dense = decode_tile(heads, positions % SIZES.P, coded, head, books, KV, raw.dtype, SIZES)
    if SIZES.CODEC != "exact":
        dense *= load_of_head(books[KV].stretch, head, SIZES)[None, :]
        dense += load_of_head(books[KV].mean, head, SIZES)[None, :]
    dense = tl.where(coded[:, None], dense, raw.to(tl.float32))
    target = out.data + row.to(tl.int64) * out.token_stride + head * out.head_stride
    mask = written[:, None] & (dims < D)[None, :]
    tl.store(target[:, None] + dims[None, :], dense.to(out.data.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _reconstruct(
    codes,
    tail,
    books,
    tables,
    out_key,
    out_value,
    request_ptr,
    position_ptr,
    count,
    SIZES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of tokens of one head, K and V."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = row < count
    head = tl.program_id(1)
    positions = tl.load(position_ptr + row, mask=valid, other=0)
    request = tl.load(request_ptr + row, mask=valid, other=0).to(tl.int64)
    sink_end, raw_start = tl.load(tables.sink_end + request), tl.load(tables.raw_start + request)
    is_raw = (positions < sink_end) | (positions >= raw_start)
    coded, is_raw = valid & (is_raw == 0), valid & is_raw
    blocks = tables.block_table + request * tables.block_table_stride
    tails = tables.tail_block_table + request * tables.tail_block_table_stride
    heads = page_start(codes.data, codes.stride, blocks, positions // SIZES.P, coded) + head * SIZES.HEAD_BYTES
    raw = load_raw(tail, tails, positions, is_raw, head, 0, SIZES)
    _rebuild(out_key, heads, raw, positions, head, row, coded, valid, books, 0, SIZES)
    raw = load_raw(tail, tails, positions, is_raw, head, 1, SIZES)
    _rebuild(out_value, heads, raw, positions, head, row, coded, valid, books, 1, SIZES)


def reconstruct(
    cache: LayerCache,
    tables: RequestTables,
    token_request: Tensor,
    token_position: Tensor,
    out_key: Tensor,
    out_value: Tensor,
) -> None:
    """Triton version of `reference.reconstruct`."""
    count = token_request.shape[0]
    if count == 0:
        return
    _reconstruct[(triton.cdiv(count, RECONSTRUCT.tile), cache.layout.num_kv_heads)](
        Pages.codes(cache),
        Pages.tail(cache),
        Book.pair(cache),
        Tables.of(tables),
        Rows.of(out_key),
        Rows.of(out_value),
        token_request,
        token_position,
        count,
        SIZES=Sizes.of(cache),
        TILE=RECONSTRUCT.tile,
        num_warps=RECONSTRUCT.num_warps,
    )
