"""sparse_decode on CUDA: attention of single tokens over coded and raw history.

The context of a token is cut into a fixed number of parts by its own length alone. One program takes one part for all
query heads of a KV head: it rebuilds K and V tiles from the codes in registers (atoms come from L2) and folds them
into an online softmax; a second kernel merges the parts by their log-sum-exp. Keys and values stay centred in the
products: the heads' means and stretches enter in float32, once a program; means can be hundreds of times larger than
what is coded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels.device.launch import DECODE, DECODE_SPLITS, MERGE, MIN_SPLIT_TOKENS
from lexico_kernels.device.records import decode_tile, load_raw, page_start
from lexico_kernels.memory.pages import LayerCache, RequestTables

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(q, k, v, valid, offset, state, factor):
    """Fold a tile into the online softmax. state: running maximum (base 2), sum and weighted values of each head.

    q [G_PAD, D_PAD]; k, v [TILE, D_PAD] in q's dtype, 0 where not valid; offset [G_PAD] is added to the scaled scores.
    """
    top, total, acc = state
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor + offset[:, None]
    scores = tl.where(valid[None, :], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def _attend_raw(
    q,
    state,
    first,
    end,
    tail_ptr,
    page_stride,
    table_ptr,
    head,
    factor,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Fold the raw tokens at positions [first, end) into the state."""
    for at in range(first, end, TILE):
        positions = at + tl.arange(0, TILE)
        valid = positions < end
        k = load_raw(tail_ptr, page_stride, table_ptr, positions, valid, head, 0, R, D, D_PAD)
        v = load_raw(tail_ptr, page_stride, table_ptr, positions, valid, head, 1, R, D, D_PAD)
        state = _attend(q, k.to(q.dtype), v.to(q.dtype), valid, tl.zeros([q.shape[0]], tl.float32), state, factor)
    return state


@triton.jit
def _decode_part(
    query_ptr,
    query_stride_t,
    query_stride_h,
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
    request_ptr,
    seq_len_ptr,
    part_out_ptr,
    part_lse_ptr,
    factor,
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
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One part of one token's context for a KV head: normalised output and base-2 log-sum-exp of its G query heads."""
    token = tl.program_id(0).to(tl.int64)
    head, part = tl.program_id(1), tl.program_id(2)
    key_atoms_ptr += head * KEY_STRIDE
    value_atoms_ptr += head * VALUE_STRIDE
    group, dims = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    seq_len = tl.load(seq_len_ptr + token)
    span = tl.maximum(tl.cdiv(tl.cdiv(seq_len, SPLITS), TILE) * TILE, MIN_SPLIT)
    first = part * span
    end = tl.minimum(first + span, seq_len)
    out_row = (token * tl.num_programs(1) * G + head * G + group) * SPLITS + part
    if first >= end:
        tl.store(part_lse_ptr + out_row, tl.full([G_PAD], -float("inf"), tl.float32), mask=group < G)
        return

    request = tl.load(request_ptr + token).to(tl.int64)
    sink_end, raw_start = tl.load(sink_end_ptr + request), tl.load(raw_start_ptr + request)
    blocks, tails = block_table_ptr + request * block_table_stride, tail_table_ptr + request * tail_table_stride
    mask = (group < G)[:, None] & (dims < D)[None, :]
    q_ptr = query_ptr + token * query_stride_t + (head * G + group)[:, None] * query_stride_h + dims[None, :]
    q = tl.load(q_ptr, mask=mask, other=0.0)
    offset, coded_q = tl.zeros([G_PAD], tl.float32), q
    if CODEC != "exact":
        key_stretch = tl.load(key_stretch_ptr + head * D + dims, mask=dims < D, other=0.0)
        coded_q = (q.to(tl.float32) * key_stretch[None, :]).to(q.dtype)
        key_mean = tl.load(key_mean_ptr + head * D + dims, mask=dims < D, other=0.0)
        offset = tl.sum(q.to(tl.float32) * key_mean[None, :], 1) * factor
    DTYPE: tl.constexpr = tail_ptr.dtype.element_ty

    state = (
        tl.full([G_PAD], -float("inf"), tl.float32),
        tl.zeros([G_PAD], tl.float32),
        tl.zeros([G_PAD, D_PAD], tl.float32),
    )
    coded_end = tl.minimum(end, raw_start)
    for at in range(tl.maximum(first, sink_end), coded_end, TILE):
        positions = at + tl.arange(0, TILE)
        valid = positions < coded_end
        heads = page_start(code_ptr, code_page_stride, blocks, positions // P, valid) + head * HEAD_BYTES
        slots = positions % P
        k = decode_tile(heads, slots, valid, key_atoms_ptr, key_levels_ptr, KEY, CODEC, DTYPE, KEY_N, D, D_PAD)
        v = decode_tile(heads, slots, valid, value_atoms_ptr, value_levels_ptr, VALUE, CODEC, DTYPE, VALUE_N, D, D_PAD)
        state = _attend(coded_q, k.to(q.dtype), v.to(q.dtype), valid, offset, state, factor)
    top, total, acc = state
    if CODEC != "exact":  # so far only coded tokens are in: stretch and the weights' sum times the mean complete them
        value_mean = tl.load(value_mean_ptr + head * D + dims, mask=dims < D, other=0.0)
        value_stretch = tl.load(value_stretch_ptr + head * D + dims, mask=dims < D, other=0.0)
        acc = acc * value_stretch[None, :] + total[:, None] * value_mean[None, :]
    state = (top, total, acc)
    state = _attend_raw(
        q, state, first, tl.minimum(end, sink_end), tail_ptr, tail_page_stride, tails, head, factor, R, D, D_PAD, TILE
    )
    state = _attend_raw(
        q, state, tl.maximum(first, raw_start), end, tail_ptr, tail_page_stride, tails, head, factor, R, D, D_PAD, TILE
    )
    top, total, acc = state
    tl.store(part_out_ptr + out_row[:, None] * D + dims[None, :], acc / total[:, None], mask=mask)
    tl.store(part_lse_ptr + out_row, top + tl.log2(total), mask=group < G)


@triton.jit
def _merge(
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    out_stride_t,
    out_stride_h,
    lse_ptr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The parts of one query head: out and natural log-sum-exp. Parts without tokens have -inf and undefined output."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims, parts = tl.arange(0, D_PAD), tl.arange(0, SPLITS)
    row = token * tl.num_programs(1) + head
    lse = tl.load(part_lse_ptr + row * SPLITS + parts)
    used = lse > -float("inf")
    top = tl.max(lse, 0)
    weight = tl.where(used, tl.exp2(lse - top), 0.0)
    total = tl.sum(weight, 0)
    mask = used[:, None] & (dims < D)[None, :]
    values = tl.load(part_out_ptr + (row * SPLITS + parts)[:, None] * D + dims[None, :], mask=mask, other=0.0)
    out = tl.sum(values * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(
        out_ptr + token * out_stride_t + head * out_stride_h + dims, out.to(out_ptr.dtype.element_ty), mask=dims < D
    )
    tl.store(lse_ptr + row, tl.where(total > 0, (top + tl.log2(total)) * LN_2, -float("inf")))


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
    """Triton version of `reference.sparse_decode`. Scratch: T * Hq * DECODE_SPLITS * (D + 1) floats."""
    layout = cache.layout
    T, Hq, D = query.shape
    Hk, D_PAD, G = layout.num_kv_heads, triton.next_power_of_2(D), Hq // layout.num_kv_heads
    out = torch.empty_like(query) if out is None else out
    lse = torch.empty(T, Hq, dtype=torch.float32, device=query.device)
    if T == 0:
        return out, lse
    part_out = torch.empty(T, Hq, DECODE_SPLITS, D, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(T, Hq, DECODE_SPLITS, dtype=torch.float32, device=query.device)
    _decode_part[(T, Hk, DECODE_SPLITS)](
        query,
        query.stride(0),
        query.stride(1),
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
        token_request,
        token_seq_len,
        part_out,
        part_lse,
        scale * LOG2_E,
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
        D=D,
        D_PAD=D_PAD,
        G=G,
        G_PAD=max(16, triton.next_power_of_2(G)),
        SPLITS=DECODE_SPLITS,
        MIN_SPLIT=MIN_SPLIT_TOKENS,
        TILE=DECODE.tile,
        num_warps=DECODE.num_warps,
        num_stages=DECODE.num_stages,
    )
    _merge[(T, Hq)](
        part_out,
        part_lse,
        out,
        out.stride(0),
        out.stride(1),
        lse,
        D=D,
        D_PAD=D_PAD,
        SPLITS=DECODE_SPLITS,
        num_warps=MERGE.num_warps,
    )
    return out, lse
