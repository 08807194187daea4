"""The last of `lookup.sparse_decode`, in Triton: codes and tail become one result."""

from typing import NamedTuple

import triton
import triton.language as tl

from lexico_kernels.device.overlap import wait_for_previous
from lexico_kernels.device.records import load_of_head
from lexico_kernels.sparse_decode.softmax import LN_2, weighed_against_sink


class MergeTiles(NamedTuple):
    """Compile-time constants of `merge`."""

    SPLITS_PAD: int
    CHUNKS: int
    CHUNKS_PAD: int
    TAIL_SPLITS: int
    CAPPED: bool
    OVERLAP: bool


@triton.jit(do_not_specialize=["lse_ptr"])
def merge(
    chunk_out_ptr,
    schedule_ptr,
    stats_ptr,
    offset_ptr,
    book,
    tail,
    sinks_ptr,
    out,
    lse_ptr,
    max_splits,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Codes, as `multiply_bins` left them, and tail of one query head: out and natural log-sum-exp.

    CAPPED: scores of codes had their offset before they were capped; else all of a head get it here. What follows is
    not of this package in general, and is not triggered.
    """
    OVERLAP: tl.constexpr = TILES.OVERLAP
    wait_for_previous(OVERLAP)
    D: tl.constexpr = SIZES.D
    G: tl.constexpr = HEADS.G
    CHUNKS: tl.constexpr = TILES.CHUNKS
    TAIL_SPLITS: tl.constexpr = TILES.TAIL_SPLITS
    CAPPED: tl.constexpr = TILES.CAPPED
    token, query_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    T, Hq = tl.num_programs(0), tl.num_programs(1)
    H = Hq // HEADS.GROUP * HEADS.PASSES
    kv_head, within = query_head // HEADS.GROUP, query_head % HEADS.GROUP
    head, g = kv_head * HEADS.PASSES + within // G, within % G
    dims, chunk, split = tl.arange(0, SIZES.D_PAD), tl.arange(0, TILES.CHUNKS_PAD), tl.arange(0, TAIL_SPLITS)
    padded = (token * H + head) * G + g
    at = (token * H + head) * HEADS.ROW + g
    some = tl.arange(0, TILES.SPLITS_PAD)
    exists = some < tl.load(schedule_ptr + token * 4 + 3)
    stats = stats_ptr + ((token * H + head) * max_splits + some) * HEADS.ROW + g
    tops = tl.load(stats, mask=exists, other=-float("inf"))
    coded_top = tl.max(tops, 0)
    shift = tl.where(exists, tl.exp2(tops - coded_top), 0.0)
    totals = stats + T * H * max_splits * HEADS.ROW
    coded_total = tl.sum(shift * tl.load(totals, mask=exists, other=0.0), 0)
    coded_lse = tl.where(coded_total > 0, coded_top + tl.log2(coded_total), -float("inf"))
    if not CAPPED:
        coded_lse += tl.load(offset_ptr + at)
    has_codes = coded_lse > -float("inf")
    tails = tl.load(tail.lse + padded * TAIL_SPLITS + split)
    has_tail = tails > -float("inf")
    top = tl.maximum(tl.max(tails, 0), coded_lse)
    coded_weight = tl.where(has_codes, tl.exp2(coded_lse - top), 0.0)
    weights = tl.where(has_tail, tl.exp2(tails - top), 0.0)
    total = tl.sum(weights, 0) + coded_weight
    mask = (chunk < CHUNKS)[:, None] & (dims < D)[None, :]  # zeros where there are no codes, and no wait to know it
    chunks = chunk_out_ptr + ((chunk * T + token) * (H * G) + head * G + g)[:, None] * D + dims[None, :]
    mean = load_of_head(book.mean, kv_head, SIZES)
    stretch = load_of_head(book.stretch, kv_head, SIZES)
    coded = tl.sum(tl.load(chunks, mask=mask, other=0.0), 0) / tl.where(coded_total > 0, coded_total, 1.0)
    acc = (coded * stretch + mean) * coded_weight
    splits = tail.out + (padded * TAIL_SPLITS + split)[:, None] * D + dims[None, :]
    acc += tl.sum(tl.load(splits, mask=(dims < D)[None, :], other=0.0) * weights[:, None], 0)
    merged = acc / tl.where(total > 0, total, 1.0)
    lse = tl.where(total > 0, (top + tl.log2(total)) * LN_2, -float("inf"))
    merged = weighed_against_sink(merged, lse, sinks_ptr, query_head)
    target = out.data + token * out.token_stride + query_head * out.head_stride + dims
    tl.store(target, merged.to(out.data.dtype.element_ty), mask=dims < D)
    tl.store(lse_ptr + token * Hq + query_head, lse)
