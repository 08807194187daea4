"""sparse_decode on any CUDA device, in Triton alone: attention of single tokens over coded and raw history.

The context of a token is cut into a fixed number of splits by its own length alone. One program takes one split for all
query heads of a KV head: it rebuilds tiles of K and V from the codes in registers (atoms come from L2) and folds them
into an online softmax; a second kernel merges the splits by their log-sum-exp. Keys and values stay centred in the
products: the heads' means and stretches enter in float32, once per program; means can be hundreds of times larger than
what is coded.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels.device.arguments import Book, Pages, Rows, Sizes, Tables
from lexico_kernels.device.launch import DECODE, DECODE_SPLITS, DECODE_STAGES, MERGE_WARPS, MIN_SPLIT_TOKENS
from lexico_kernels.device.records import decode_tile, load_of_head, page_start
from lexico_kernels.memory.pages import LayerCache, RequestTables
from lexico_kernels.sparse_decode.softmax import (
    LN_2,
    LOG2_E,
    attend,
    attend_raw,
    empty_state,
    load_queries,
    weighed_against_sink,
)


class Splits(NamedTuple):
    """Compile-time constants of `_decode_split`."""

    COUNT: int  # of a context
    MIN: int  # tokens of one
    TILE: int  # tokens that are rebuilt at a time
    CAP: float  # of scores in base 2, see `soft_capped`


@triton.jit
def _attend_coded(
    q,
    first,
    end,
    codes,
    tables,
    request,
    books,
    head,
    factor,
    DTYPE: tl.constexpr,
    SIZES: tl.constexpr,
    TILE: tl.constexpr,
    CAP: tl.constexpr,
):
    """The state of the coded tokens at positions [first, end). DTYPE: of "exact" vectors."""
    P: tl.constexpr = SIZES.P
    G_PAD: tl.constexpr = q.shape[0]
    offset, coded_q = tl.zeros([G_PAD], tl.float32), q
    if SIZES.CODEC != "exact":
        coded_q = (q.to(tl.float32) * load_of_head(books[0].stretch, head, SIZES)[None, :]).to(q.dtype)
        offset = tl.sum(q.to(tl.float32) * load_of_head(books[0].mean, head, SIZES)[None, :], 1) * factor
    blocks = tables.block_table + request * tables.block_table_stride
    state = empty_state(G_PAD, q.shape[1])
    for at in range(first, end, TILE):
        positions = at + tl.arange(0, TILE)
        valid = positions < end
        heads = page_start(codes.data, codes.stride, blocks, positions // P, valid) + head * SIZES.HEAD_BYTES
        slots = positions % P
        k = decode_tile(heads, slots, valid, head, books, 0, DTYPE, SIZES)
        v = decode_tile(heads, slots, valid, head, books, 1, DTYPE, SIZES)
        state = attend(coded_q, k.to(q.dtype), v.to(q.dtype), valid, offset, state, factor, CAP)
    top, total, acc = state
    if SIZES.CODEC != "exact":  # stretch, and the weights' sum times the mean, complete the values
        value_mean = load_of_head(books[1].mean, head, SIZES)
        value_stretch = load_of_head(books[1].stretch, head, SIZES)
        acc = acc * value_stretch[None, :] + total[:, None] * value_mean[None, :]
    return top, total, acc


@triton.jit
def _decode_split(
    query,
    codes,
    tail,
    books,
    tables,
    request_ptr,
    seq_len_ptr,
    split_out_ptr,
    split_lse_ptr,
    factor,
    SIZES: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One split of one token's context for a KV head: normalised output and base-2 log-sum-exp of its G query heads."""
    D: tl.constexpr = SIZES.D
    COUNT: tl.constexpr = SPLITS.COUNT
    TILE: tl.constexpr = SPLITS.TILE
    CAP: tl.constexpr = SPLITS.CAP
    token = tl.program_id(0).to(tl.int64)
    head, split = tl.program_id(1), tl.program_id(2)
    heads = tl.arange(0, G_PAD)
    seq_len = tl.load(seq_len_ptr + token)
    size = tl.maximum(tl.cdiv(tl.cdiv(seq_len, COUNT), TILE) * TILE, SPLITS.MIN)
    first = split * size
    end = tl.minimum(first + size, seq_len)
    out_row = (token * tl.num_programs(1) * G + head * G + heads) * COUNT + split
    if first >= end:
        tl.store(split_lse_ptr + out_row, tl.full([G_PAD], -float("inf"), tl.float32), mask=heads < G)
        return

    request = tl.load(request_ptr + token).to(tl.int64)
    sink_end, raw_start = tl.load(tables.sink_end + request), tl.load(tables.raw_start + request)
    tails = tables.tail_block_table + request * tables.tail_block_table_stride
    q, mask = load_queries(query, token, head * G, heads, SIZES, G)
    DTYPE: tl.constexpr = tail.data.dtype.element_ty
    coded_first, coded_end = tl.maximum(first, sink_end), tl.minimum(end, raw_start)
    state = _attend_coded(
        q, coded_first, coded_end, codes, tables, request, books, head, factor, DTYPE, SIZES, TILE, CAP
    )
    state = attend_raw(q, state, first, tl.minimum(end, sink_end), tail, tails, head, factor, SIZES, TILE, CAP)
    state = attend_raw(q, state, tl.maximum(first, raw_start), end, tail, tails, head, factor, SIZES, TILE, CAP)
    top, total, acc = state
    dims = tl.arange(0, q.shape[1])
    tl.store(split_out_ptr + out_row[:, None] * D + dims[None, :], acc / total[:, None], mask=mask)
    tl.store(split_lse_ptr + out_row, top + tl.log2(total), mask=heads < G)


@triton.jit
def _merge(split_out_ptr, split_lse_ptr, sinks_ptr, out, lse_ptr, SIZES: tl.constexpr, SPLITS: tl.constexpr):
    """Out and natural log-sum-exp of one query head. Splits without tokens have -inf and undefined output."""
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims, splits = tl.arange(0, D_PAD), tl.arange(0, SPLITS)
    row = token * tl.num_programs(1) + head
    parts = tl.load(split_lse_ptr + row * SPLITS + splits)
    used = parts > -float("inf")
    top = tl.max(parts, 0)
    weight = tl.where(used, tl.exp2(parts - top), 0.0)
    total = tl.sum(weight, 0)
    mask = used[:, None] & (dims < D)[None, :]
    values = tl.load(split_out_ptr + (row * SPLITS + splits)[:, None] * D + dims[None, :], mask=mask, other=0.0)
    merged = tl.sum(values * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, (top + tl.log2(total)) * LN_2, -float("inf"))
    merged = weighed_against_sink(merged, lse, sinks_ptr, head)
    target = out.data + token * out.token_stride + head * out.head_stride + dims
    tl.store(target, merged.to(out.data.dtype.element_ty), mask=dims < D)
    tl.store(lse_ptr + row, lse)


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
    """Triton version of `reference.sparse_decode`. Scratch: T * Hq * DECODE_SPLITS * (D + 1) floats."""
    T, Hq, D = query.shape
    Hk, sizes = cache.layout.num_kv_heads, Sizes.of(cache)
    out = torch.empty_like(query) if out is None else out
    lse = torch.empty(T, Hq, dtype=torch.float32, device=query.device)
    if T == 0:
        return out, lse
    split_out = torch.empty(T, Hq, DECODE_SPLITS, D, dtype=torch.float32, device=query.device)
    split_lse = torch.empty(T, Hq, DECODE_SPLITS, dtype=torch.float32, device=query.device)
    _decode_split[(T, Hk, DECODE_SPLITS)](
        Rows.of(query),
        Pages.codes(cache),
        Pages.tail(cache),
        Book.pair(cache),
        Tables.of(tables),
        token_request,
        token_seq_len,
        split_out,
        split_lse,
        scale * LOG2_E,
        SIZES=sizes,
        G=Hq // Hk,
        G_PAD=max(16, triton.next_power_of_2(Hq // Hk)),
        SPLITS=Splits(DECODE_SPLITS, MIN_SPLIT_TOKENS, DECODE.tile, soft_cap * LOG2_E),
        num_warps=DECODE.num_warps,
        num_stages=DECODE_STAGES,
    )
    _merge[(T, Hq)](
        split_out, split_lse, sinks, Rows.of(out), lse, SIZES=sizes, SPLITS=DECODE_SPLITS, num_warps=MERGE_WARPS
    )
    return out, lse
