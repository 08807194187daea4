"""reconstruct on CUDA: dense K and V of tokens of any requests."""

import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels.device.launch import RECONSTRUCT
from lexico_kernels.device.records import decode_tile, load_raw, page_start
from lexico_kernels.memory.pages import LayerCache, RequestTables


@triton.jit
def _rebuild_part(
    out_ptr,
    out_stride_t,
    out_stride_h,
    atoms_ptr,
    levels_ptr,
    mean_ptr,
    stretch_ptr,
    heads,
    raw,
    positions,
    head,
    row,
    coded,
    written,
    ADDRESS: tl.constexpr,
    CODEC: tl.constexpr,
    P: tl.constexpr,
    DTYPE: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """K or V of one tile: decoded where coded, else the raw rows given."""
    dims = tl.arange(0, D_PAD)
    dense = decode_tile(heads, positions % P, coded, atoms_ptr, levels_ptr, ADDRESS, CODEC, DTYPE, N, D, D_PAD)
    if CODEC != "exact":
        dense *= tl.load(stretch_ptr + head * D + dims, mask=dims < D, other=0.0)[None, :]
        dense += tl.load(mean_ptr + head * D + dims, mask=dims < D, other=0.0)[None, :]
    dense = tl.where(coded[:, None], dense, raw.to(tl.float32))
    target = out_ptr + row.to(tl.int64) * out_stride_t + head * out_stride_h
    mask = written[:, None] & (dims < D)[None, :]
    tl.store(target[:, None] + dims[None, :], dense.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _reconstruct(
    code_ptr,
    code_page_stride,
    tail_ptr,
    tail_page_stride,
    key_atoms_ptr,
    key_levels_ptr,
    key_mean_ptr,
    key_stretch_ptr,
    value_atoms_ptr,
    value_levels_ptr,
    value_mean_ptr,
    value_stretch_ptr,
    block_table_ptr,
    block_table_stride,
    tail_table_ptr,
    tail_table_stride,
    sink_end_ptr,
    raw_start_ptr,
    out_key_ptr,
    out_key_stride_t,
    out_key_stride_h,
    out_value_ptr,
    out_value_stride_t,
    out_value_stride_h,
    request_ptr,
    position_ptr,
    count,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    CODEC: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    KEY_N: tl.constexpr,
    VALUE_N: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of tokens of one head, K and V."""
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = row < count
    head = tl.program_id(1)
    key_atoms_ptr += head * KEY_STRIDE
    value_atoms_ptr += head * VALUE_STRIDE
    positions = tl.load(position_ptr + row, mask=valid, other=0)
    request = tl.load(request_ptr + row, mask=valid, other=0).to(tl.int64)
    is_raw = (positions < tl.load(sink_end_ptr + request)) | (positions >= tl.load(raw_start_ptr + request))
    coded, is_raw = valid & (is_raw == 0), valid & is_raw
    blocks = block_table_ptr + request * block_table_stride
    tails = tail_table_ptr + request * tail_table_stride
    heads = page_start(code_ptr, code_page_stride, blocks, positions // P, coded) + head * HEAD_BYTES
    DTYPE: tl.constexpr = tail_ptr.dtype.element_ty
    raw = load_raw(tail_ptr, tail_page_stride, tails, positions, is_raw, head, 0, R, D, D_PAD)
    _rebuild_part(
        out_key_ptr, out_key_stride_t, out_key_stride_h, key_atoms_ptr, key_levels_ptr, key_mean_ptr,
        key_stretch_ptr,
        heads, raw, positions, head, row, coded, valid, KEY, CODEC, P, DTYPE, KEY_N, D, D_PAD,
    )  # fmt: skip
    raw = load_raw(tail_ptr, tail_page_stride, tails, positions, is_raw, head, 1, R, D, D_PAD)
    _rebuild_part(
        out_value_ptr, out_value_stride_t, out_value_stride_h, value_atoms_ptr, value_levels_ptr, value_mean_ptr,
        value_stretch_ptr,
        heads, raw, positions, head, row, coded, valid, VALUE, CODEC, P, DTYPE, VALUE_N, D, D_PAD,
    )  # fmt: skip


def reconstruct(
    cache: LayerCache,
    tables: RequestTables,
    token_request: Tensor,
    token_position: Tensor,
    out_key: Tensor,
    out_value: Tensor,
) -> None:
    """Triton version of `reference.reconstruct`."""
    layout, count = cache.layout, token_request.shape[0]
    if count == 0:
        return
    _reconstruct[(triton.cdiv(count, RECONSTRUCT.tile), layout.num_kv_heads)](
        cache.code_pages,
        cache.code_pages.stride(0),
        cache.tail_pages,
        cache.tail_pages.stride(0),
        cache.key.atoms,
        cache.key.levels,
        cache.key.mean,
        cache.key.stretch,
        cache.value.atoms,
        cache.value.levels,
        cache.value.mean,
        cache.value.stretch,
        tables.block_table,
        tables.block_table.stride(0),
        tables.tail_block_table,
        tables.tail_block_table.stride(0),
        tables.sink_end,
        tables.raw_start,
        out_key,
        out_key.stride(0),
        out_key.stride(1),
        out_value,
        out_value.stride(0),
        out_value.stride(1),
        token_request,
        token_position,
        count,
        KEY=layout.address("key"),
        VALUE=layout.address("value"),
        HEAD_BYTES=layout.head_bytes,
        CODEC=layout.codec,
        P=layout.block_tokens,
        R=layout.tail_tokens,
        KEY_N=cache.key.num_atoms,
        VALUE_N=cache.value.num_atoms,
        KEY_STRIDE=cache.key.head_stride,
        VALUE_STRIDE=cache.value.head_stride,
        D=layout.head_dim,
        D_PAD=triton.next_power_of_2(layout.head_dim),
        TILE=RECONSTRUCT.tile,
        num_warps=RECONSTRUCT.num_warps,
    )
