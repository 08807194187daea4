"""What a step of decode needs to know, in one launch for code pages and one for tail pages.

The arithmetic is that of `vllm_lexico/serve/coding_plan.py`, which in torch takes some hundred launches. Grids depend
on shapes alone, and nothing is read on the host.
"""

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels.device.launch import PLAN_CODES, PLAN_TAIL_JOBS, PLAN_TAIL_PAGES, PLAN_TAIL_REQUESTS
from lexico_kernels.memory import layout
from lexico_kernels.memory.pages import DecodePlan

SPAN_TOKENS = tl.constexpr(layout.SPAN_TOKENS)
DELAY_BITS = tl.constexpr(layout.DELAY_BITS)
DELAY_SHIFT = tl.constexpr(layout.DELAY_SHIFT)
FIRST_FACTOR, SECOND_FACTOR = (tl.constexpr(factor) for factor in layout.DELAY_FACTORS)
MASK = tl.constexpr((1 << layout.DELAY_BITS) - 1)


class TailSizes(NamedTuple):
    """Compile-time constants of `_plan_tail`."""

    R: int
    WINDOW: int
    SINK_END: int
    BLOCK: int
    PAGES: int  # of a window, looked at together; a power of two
    JOBS: int
    REQUESTS: int


@triton.jit
def _locate(token, starts_ptr, seq_lens_ptr, num_requests, turns):
    """Request of each token, the last one for padding, and position, -1 for padding; by bisection in `turns` turns."""
    low = tl.zeros_like(token)
    high = low + num_requests
    for _ in range(turns):
        middle = (low + high) // 2
        looks = low < high
        is_over = tl.load(starts_ptr + 1 + middle, mask=looks, other=0) <= token
        low = tl.where(looks & is_over, middle + 1, low)
        high = tl.where(looks & (is_over == 0), middle, high)
    request = tl.minimum(low, num_requests - 1)
    ahead = tl.load(starts_ptr + 1 + request) - token
    return request, tl.where(low < num_requests, tl.load(seq_lens_ptr + request) - ahead, -1)


@triton.jit
def _ending_spans(
    token, there, starts_ptr, seq_lens_ptr, table_ptr, table_stride, num_requests, turns, P: tl.constexpr
):
    """Of each token: request, position, slot of the first token of the span that it ends, and whether it ends one."""
    request, position = _locate(token, starts_ptr, seq_lens_ptr, num_requests, turns)
    written = tl.maximum(position, 0)
    offset = written % P
    row = table_ptr + request.to(tl.int64) * table_stride
    page = tl.load(row + written // P, mask=there, other=0).to(tl.int64)
    mixed = page * FIRST_FACTOR & MASK
    mixed = (mixed ^ (mixed >> DELAY_SHIFT)) * SECOND_FACTOR & MASK
    delay = tl.where(offset == P - 1, 0, (mixed * SPAN_TOKENS >> DELAY_BITS).to(tl.int32))
    done = offset - delay + 1
    ends = there & (position >= 0) & (done > 0) & (done % SPAN_TOKENS == 0)
    return request, position, delay, page * P + done - SPAN_TOKENS, ends


@triton.jit(
    do_not_specialize=[
        "starts_ptr", "seq_lens_ptr", "table_ptr", "table_stride", "num_tokens", "num_requests", "num_jobs", "turns"
    ]
)  # fmt: skip
def _plan_codes(
    starts_ptr,
    seq_lens_ptr,
    table_ptr,
    table_stride,
    num_tokens,
    num_requests,
    num_jobs,
    turns,
    out,
    P: tl.constexpr,
    OWN: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """OWN tokens of the batch, the spans that they end, and places of the list that are not used.

    Each program counts the spans of all tokens, so that none waits for another.
    """
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    there = own < num_tokens
    request, position, delay, slot, ends = _ending_spans(
        own, there, starts_ptr, seq_lens_ptr, table_ptr, table_stride, num_requests, turns, P
    )
    tl.store(out.token_request + own, request, mask=there)
    tl.store(out.token_seq_len + own, position + 1, mask=there)
    before, total = 0, 0
    for start in range(0, num_tokens, COUNTED):
        token = start + tl.arange(0, COUNTED)
        _request, _position, _delay, _slot, counted = _ending_spans(
            token, token < num_tokens, starts_ptr, seq_lens_ptr, table_ptr, table_stride, num_requests, turns, P
        )
        total += tl.sum(counted.to(tl.int32), 0)
        before += tl.sum((counted & (token < tl.program_id(0) * OWN)).to(tl.int32), 0)
    job = tl.arange(0, SPAN_TOKENS)[None, :]
    at = ((before + tl.cumsum(ends.to(tl.int32), 0) - 1) * SPAN_TOKENS)[:, None] + job
    mask = ends[:, None] & (at < num_jobs)
    tl.store(out.request + at, request[:, None] + tl.zeros_like(job), mask=mask)
    tl.store(out.position + at, (position - delay - (SPAN_TOKENS - 1))[:, None] + job, mask=mask)
    tl.store(out.destination + at, slot[:, None] + job, mask=mask)
    at = own[:, None] * SPAN_TOKENS + job
    unused = (own >= total)[:, None] & (at < num_jobs)
    nothing = tl.zeros_like(at)
    tl.store(out.request + at, nothing, mask=unused)
    tl.store(out.position + at, nothing - 1, mask=unused)
    tl.store(out.destination + at, (nothing - 1).to(tl.int64), mask=unused)


@triton.jit
def _find_sources(first, table_ptr, table_stride, request_ptr, position_ptr, num_jobs, source_ptr, SIZES: tl.constexpr):
    """Where JOBS tokens to code are read."""
    R: tl.constexpr = SIZES.R
    JOBS: tl.constexpr = SIZES.JOBS
    job = first + tl.arange(0, JOBS)
    request = tl.load(request_ptr + job, mask=job < num_jobs, other=0).to(tl.int64)
    position = tl.load(position_ptr + job, mask=job < num_jobs, other=-1)
    coded = position >= 0
    page = tl.load(table_ptr + request * table_stride + position // R, mask=coded, other=0)
    tl.store(source_ptr + job, tl.where(coded, -1 - (page * R + position % R), -1), mask=job < num_jobs)


@triton.jit
def _find_raw_starts(
    first, starts_ptr, seq_lens_ptr, table_ptr, table_stride, width, num_requests, raw_start_ptr, SIZES: tl.constexpr
):
    """Where the raw contexts of REQUESTS start."""
    R: tl.constexpr = SIZES.R
    WINDOW: tl.constexpr = SIZES.WINDOW
    BLOCK: tl.constexpr = SIZES.BLOCK
    PAGES: tl.constexpr = SIZES.PAGES
    REQUESTS: tl.constexpr = SIZES.REQUESTS
    SINK_END: tl.constexpr = SIZES.SINK_END
    request = first + tl.arange(0, REQUESTS)
    there = request < num_requests
    start = tl.load(starts_ptr + request, mask=there, other=0)
    end = tl.load(starts_ptr + 1 + request, mask=there, other=0)
    computed = tl.load(seq_lens_ptr + request, mask=there, other=0) - (end - start)
    computed = tl.maximum(computed, 0) // BLOCK * BLOCK
    first_page = tl.maximum(computed - WINDOW, 0) // R
    row = table_ptr + request.to(tl.int64)[:, None] * table_stride
    missing = tl.zeros_like(first_page)  # pages at the window's start, up to the last that is missing
    for at in range(0, tl.cdiv(WINDOW, R) + 1, PAGES):
        ahead = at + tl.arange(0, PAGES)[None, :]
        page = first_page[:, None] + ahead
        block = tl.load(row + tl.minimum(page, width - 1), mask=there[:, None], other=1)
        is_missing = (block == 0) & (page * R < computed[:, None]) & (ahead < tl.cdiv(WINDOW, R) + 1)
        missing = tl.maximum(missing, tl.max(tl.where(is_missing, ahead + 1, 0), 1))
    first_raw_page = first_page + missing
    tl.store(raw_start_ptr + request, tl.maximum(first_raw_page * R, SINK_END), mask=there)


@triton.jit(
    do_not_specialize=["starts_ptr", "seq_lens_ptr", "table_ptr", "table_stride", "width", "num_requests", "num_jobs"]
)
def _plan_tail(
    starts_ptr,
    seq_lens_ptr,
    table_ptr,
    table_stride,
    width,
    request_ptr,
    position_ptr,
    num_requests,
    num_jobs,
    source_ptr,
    raw_start_ptr,
    SIZES: tl.constexpr,
):
    """The first programs take the tokens to code, the others requests."""
    program, job_programs = tl.program_id(0), tl.cdiv(num_jobs, SIZES.JOBS)
    if program < job_programs:
        first = program * SIZES.JOBS
        _find_sources(first, table_ptr, table_stride, request_ptr, position_ptr, num_jobs, source_ptr, SIZES)
    else:
        first = (program - job_programs) * SIZES.REQUESTS
        _find_raw_starts(
            first, starts_ptr, seq_lens_ptr, table_ptr, table_stride, width, num_requests, raw_start_ptr, SIZES
        )


def plan_codes(
    query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, *, block_tokens: int, out: DecodePlan
) -> None:
    """Find each token's request and length, and the tokens that a step codes. Batches may be padded.

    Args:
        query_start_loc: int32 [B + 1], first token of each request in the batch.
        seq_lens: int32 [B], tokens of each request once the step is done.
        block_table: int32 [B, max_pages], of the code pages.
        block_tokens: P.
        out: filled; its sizes are T, and M of `coding_plan.max_coded_tokens`.
    """
    T, B = out.token_request.shape[0], seq_lens.shape[0]
    if T == 0:
        return
    _plan_codes[(-(-T // PLAN_CODES.own),)](
        query_start_loc,
        seq_lens,
        block_table,
        block_table.stride(0),
        T,
        B,
        out.position.shape[0],
        B.bit_length(),
        out,
        P=block_tokens,
        OWN=PLAN_CODES.own,
        COUNTED=PLAN_CODES.counted,
        num_warps=PLAN_CODES.num_warps,
    )


def plan_tail(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    tail_block_table: Tensor,
    request: Tensor,
    position: Tensor,
    source: Tensor,
    raw_start: Tensor,
    block_tokens: int,
    tail_tokens: int,
    window_tokens: int,
    sink_end: int,
) -> None:
    """Find where the tokens to code are read, and where raw contexts start.

    Args:
        query_start_loc, seq_lens: as `plan_codes` has them.
        tail_block_table: int32 [B, max_pages], of the tail pages.
        request, position: int32 [M], that `plan_codes` filled.
        source: int32 [M], filled: -1 - slot in the tail pages, -1 where nothing is coded.
        raw_start: int32 [B], filled.
        block_tokens, tail_tokens, window_tokens, sink_end: of `coding_plan.raw_starts`.
    """
    B, M = seq_lens.shape[0], source.shape[0]
    grid = -(-M // PLAN_TAIL_JOBS.tile) - (-B // PLAN_TAIL_REQUESTS)
    _plan_tail[(grid,)](
        query_start_loc,
        seq_lens,
        tail_block_table,
        tail_block_table.stride(0),
        tail_block_table.shape[1],
        request,
        position,
        B,
        M,
        source,
        raw_start,
        SIZES=_tail_sizes(block_tokens, tail_tokens, window_tokens, sink_end),
        num_warps=PLAN_TAIL_JOBS.num_warps,
    )


@cache
def _tail_sizes(block_tokens: int, tail_tokens: int, window_tokens: int, sink_end: int) -> TailSizes:
    return TailSizes(
        R=tail_tokens,
        WINDOW=window_tokens,
        SINK_END=sink_end,
        BLOCK=block_tokens,
        PAGES=min(PLAN_TAIL_PAGES, triton.next_power_of_2(triton.cdiv(window_tokens, tail_tokens) + 1)),
        JOBS=PLAN_TAIL_JOBS.tile,
        REQUESTS=PLAN_TAIL_REQUESTS,
    )
