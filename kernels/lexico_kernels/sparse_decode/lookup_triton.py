"""What surrounds the CUDA C++ kernel of `table_decode`, in Triton: products with the atoms, the tail, the merge.

Heads here are blocks of G query heads that share a KV head, H of them; ROW is G up to a power of two. A column is a
token's head: COLUMNS // ROW tokens go through one program, in columns [token, head of the block].
"""

import triton
import triton.language as tl

from lexico_kernels.sparse_decode.portable import _attend_raw

LN_2 = tl.constexpr(0.6931471805599453)
# Bins come as halves up to 2^15. Those of all parts of a context are added up and must stay finite as halves.
BIN_SHRINK = tl.constexpr(1 / 1024)


@triton.jit
def columns(block, T, G: tl.constexpr, ROW: tl.constexpr, COLUMNS: tl.constexpr):
    """Token and head of each column, and whether there is such a token."""
    column = tl.arange(0, COLUMNS)
    token = block * (COLUMNS // ROW) + column // ROW
    return token.to(tl.int64), column % ROW, token < T


@triton.jit
def _make_tables(
    tile,
    head,
    block,
    H,
    query_ptr,
    query_stride_t,
    query_stride_h,
    atoms_ptr,
    mean_ptr,
    stretch_ptr,
    request_ptr,
    seq_len_ptr,
    sink_end_ptr,
    raw_start_ptr,
    table_ptr,
    query_scale_ptr,
    offset_ptr,
    plan_ptr,
    factor,
    T,
    HEAD_STRIDE: tl.constexpr,
    HEAD_GROUPS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    G: tl.constexpr,
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    SHORT_SPAN: tl.constexpr,
    SHORT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Products of atoms and stretched queries of length 1, [T, H, N, ROW] halves, and what makes scores of them.

    The context's plan follows from its own length alone: up to SHORT tokens in parts of SHORT_SPAN at most, longer ones
    in parts of SPAN at most, all of one size. Parts begin at multiples of 32 tokens, as groups of ordered records do.
    """
    token, g, there = columns(block, T, G, ROW, COLUMNS)
    dims = tl.arange(0, D_PAD)
    kv_head = head // HEAD_GROUPS
    used = there & (g < G)
    q_ptr = query_ptr + token * query_stride_t + (head * G + g) * query_stride_h
    q = tl.load(q_ptr[None, :] + dims[:, None], mask=(dims < D)[:, None] & used[None, :], other=0.0)
    wide = q.to(tl.float32)
    stretched = wide * tl.load(stretch_ptr + kv_head * D + dims, mask=dims < D, other=0.0)[:, None]
    length = tl.sqrt(tl.sum(stretched * stretched, 0))
    unit = (stretched * tl.where(length > 0, 1 / length, 0.0)[None, :]).to(tl.float16)
    atom = tile * TILE + tl.arange(0, TILE)
    mask = (atom < N)[:, None] & (dims < D)[None, :]
    atoms = tl.load(atoms_ptr + kv_head * HEAD_STRIDE + atom[:, None] * D + dims[None, :], mask=mask, other=0.0)
    products = tl.dot(atoms.to(tl.float16), unit)  # numbers up to 1, of which halves keep more than bfloat16
    row = token * H + head
    target = table_ptr + ((row * N)[None, :] + atom[:, None]) * ROW + g[None, :]
    tl.store(target, products.to(tl.float16), mask=(atom < N)[:, None] & there[None, :])
    if tile == 0:
        mean = tl.load(mean_ptr + kv_head * D + dims, mask=dims < D, other=0.0)
        tl.store(query_scale_ptr + row * ROW + g, length * factor, mask=there)
        tl.store(offset_ptr + row * ROW + g, tl.sum(wide * mean[:, None], 0) * factor, mask=there)
        if head == 0:
            request = tl.load(request_ptr + token, mask=there, other=0).to(tl.int64)
            first = tl.load(sink_end_ptr + request)
            end = tl.minimum(tl.load(raw_start_ptr + request), tl.load(seq_len_ptr + token, mask=there, other=0))
            count = tl.where(end > first, end - first // 32 * 32, 0)
            parts = tl.cdiv(count, tl.where(count > SHORT, SPAN, SHORT_SPAN))
            span = tl.cdiv(tl.cdiv(count, tl.maximum(parts, 1)), 32) * 32
            parts = tl.cdiv(count, tl.maximum(span, 1))
            plan = plan_ptr + token * 4
            own = there & (g == 0)
            tl.store(plan, first, mask=own)
            tl.store(plan + 1, end, mask=own)
            tl.store(plan + 2, span, mask=own)
            tl.store(plan + 3, parts, mask=own)


@triton.jit
def _attend_tail(
    token,
    head,
    part,
    H,
    query_ptr,
    query_stride_t,
    query_stride_h,
    tail_ptr,
    tail_page_stride,
    tail_table_ptr,
    tail_table_stride,
    request_ptr,
    seq_len_ptr,
    sink_end_ptr,
    raw_start_ptr,
    part_out_ptr,
    part_lse_ptr,
    factor,
    HEAD_GROUPS: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    KV: tl.constexpr,
    TILE: tl.constexpr,
):
    """One part of one token's raw context: normalised output [T, H * G, PARTS, D] and base-2 log-sum-exp.

    Part p takes the p-th share of the sinks and of the window, so that parts are alike.
    """
    group, dims = tl.arange(0, G_PAD), tl.arange(0, D_PAD)
    request = tl.load(request_ptr + token).to(tl.int64)
    seq_len = tl.load(seq_len_ptr + token)
    sinks = tl.minimum(tl.load(sink_end_ptr + request), seq_len)
    first = tl.minimum(tl.maximum(tl.load(raw_start_ptr + request), sinks), seq_len)
    mask = (group < G)[:, None] & (dims < D)[None, :]
    q_ptr = query_ptr + token * query_stride_t + (head * G + group)[:, None] * query_stride_h + dims[None, :]
    q = tl.load(q_ptr, mask=mask, other=0.0)
    state = (
        tl.full([G_PAD], -float("inf"), tl.float32),
        tl.zeros([G_PAD], tl.float32),
        tl.zeros([G_PAD, D_PAD], tl.float32),
    )
    tails = tail_table_ptr + request * tail_table_stride
    kv_head = head // HEAD_GROUPS
    if part == KV - 1:
        state = _attend_raw(q, state, 0, sinks, tail_ptr, tail_page_stride, tails, kv_head, factor, R, D, D_PAD, TILE)
    span = tl.cdiv(tl.cdiv(seq_len - first, KV), TILE) * TILE
    start = first + part * span
    end = tl.minimum(start + span, seq_len)
    state = _attend_raw(q, state, start, end, tail_ptr, tail_page_stride, tails, kv_head, factor, R, D, D_PAD, TILE)
    top, total, acc = state
    out_row = (token * H * G + head * G + group) * KV + part
    empty = total == 0
    tl.store(part_out_ptr + out_row[:, None] * D + dims[None, :], acc / tl.where(empty, 1.0, total)[:, None], mask=mask)
    tl.store(part_lse_ptr + out_row, tl.where(empty, -float("inf"), top + tl.log2(total)), mask=group < G)


@triton.jit
def prepare(
    query_ptr,
    query_stride_t,
    query_stride_h,
    atoms_ptr,
    mean_ptr,
    stretch_ptr,
    request_ptr,
    seq_len_ptr,
    sink_end_ptr,
    raw_start_ptr,
    table_ptr,
    query_scale_ptr,
    offset_ptr,
    plan_ptr,
    tail_ptr,
    tail_page_stride,
    tail_table_ptr,
    tail_table_stride,
    part_out_ptr,
    part_lse_ptr,
    factor,
    T,
    H: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    HEAD_GROUPS: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    G: tl.constexpr,
    G_PAD: tl.constexpr,
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPAN: tl.constexpr,
    SHORT_SPAN: tl.constexpr,
    SHORT: tl.constexpr,
    TILE: tl.constexpr,
    KV: tl.constexpr,
    TAIL_TILE: tl.constexpr,
):
    """What needs nothing but the query, side by side: the first T * H * PARTS programs attend the raw context, the
    others make tables."""
    program = tl.program_id(0)
    tails = T * (H * KV)
    if program < tails:
        _attend_tail(
            (program // (H * KV)).to(tl.int64),
            program // KV % H,
            program % KV,
            H,
            query_ptr,
            query_stride_t,
            query_stride_h,
            tail_ptr,
            tail_page_stride,
            tail_table_ptr,
            tail_table_stride,
            request_ptr,
            seq_len_ptr,
            sink_end_ptr,
            raw_start_ptr,
            part_out_ptr,
            part_lse_ptr,
            factor,
            HEAD_GROUPS,
            R,
            D,
            D_PAD,
            G,
            G_PAD,
            KV,
            TAIL_TILE,
        )
    else:
        TILES: tl.constexpr = (N + TILE - 1) // TILE
        program -= tails
        _make_tables(
            program % TILES,
            program // TILES % H,
            program // (TILES * H),
            H,
            query_ptr,
            query_stride_t,
            query_stride_h,
            atoms_ptr,
            mean_ptr,
            stretch_ptr,
            request_ptr,
            seq_len_ptr,
            sink_end_ptr,
            raw_start_ptr,
            table_ptr,
            query_scale_ptr,
            offset_ptr,
            plan_ptr,
            factor,
            T,
            HEAD_STRIDE,
            HEAD_GROUPS,
            N,
            D,
            D_PAD,
            G,
            ROW,
            COLUMNS,
            SPAN,
            SHORT_SPAN,
            SHORT,
            TILE,
        )


@triton.jit
def multiply_bins(
    plan_ptr,
    bins_ptr,
    stats_ptr,
    stats_stride,
    atoms_ptr,
    chunk_out_ptr,
    coded_lse_ptr,
    T,
    KV,
    HEAD_STRIDE: tl.constexpr,
    HEAD_GROUPS: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    G: tl.constexpr,
    ROW: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS_PAD: tl.constexpr,
    PARTS_AT_ONCE: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Merge the parts' bins, halves [T, H, PARTS, G, N], of a chunk of atoms and multiply them with the atoms.

    chunk_out: float32 [chunks, T, H * G, D], to be added up; coded_lse: [T, H, ROW] in base 2, without the offset.
    """
    chunk, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    H = tl.num_programs(1)
    token, g, there = columns(block, T, G, ROW, COLUMNS)
    dims = tl.arange(0, D_PAD)
    row = token * H + head
    parts = tl.load(plan_ptr + token * 4 + 3, mask=there, other=0)
    part = tl.arange(0, PARTS_PAD)
    exists = (part[:, None] < parts[None, :]) & (g < G)[None, :]
    at = stats_ptr + (row * KV)[None, :] * ROW + part[:, None] * ROW + g[None, :]
    tops = tl.load(at, mask=exists, other=-float("inf"))
    top = tl.max(tops, 0)
    shift = tl.where(exists, tl.exp2(tops - top[None, :]), 0.0)
    total = tl.sum(shift * tl.load(at + stats_stride, mask=exists, other=0.0), 0)
    unit = tl.max(shift * tl.load(at + 2 * stats_stride, mask=exists, other=0.0), 0)  # of the merged bins
    if chunk == 0:
        tl.store(coded_lse_ptr + row * ROW + g, tl.where(total > 0, top + tl.log2(total), -float("inf")), mask=there)
    most = tl.max(parts, 0)
    out = tl.zeros([D_PAD, COLUMNS], tl.float32)
    for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, N), TILE):
        atom = first + tl.arange(0, TILE)
        mask = (dims < D)[:, None] & (atom < N)[None, :]
        atoms = tl.load(
            atoms_ptr + (head // HEAD_GROUPS) * HEAD_STRIDE + atom[None, :] * D + dims[:, None], mask=mask, other=0.0
        )
        bins = tl.zeros([TILE, COLUMNS], tl.float32)
        for first_part in range(0, most, PARTS_AT_ONCE):
            for later in tl.static_range(PARTS_AT_ONCE):  # one by one: a sum over an axis would go through other lanes
                some = first_part + later
                used = (some < parts) & (g < G)
                place = row * KV + some
                stat = stats_ptr + place * ROW + g
                worth = tl.load(stat + 2 * stats_stride, mask=used, other=0.0)
                worth *= tl.where(used, tl.exp2(tl.load(stat, mask=used, other=0.0) - top), 0.0)
                worth = worth / tl.where(unit > 0, unit, 1.0) * BIN_SHRINK
                source = bins_ptr + (place * G + g)[None, :] * N + atom[:, None]
                values = tl.load(source, mask=used[None, :] & (atom < N)[:, None], other=0.0)
                bins += values.to(tl.float32) * worth[None, :]
        out = tl.dot(atoms.to(tl.float16), bins.to(tl.float16), out)
    out *= (unit / tl.where(total > 0, total, 1.0) / BIN_SHRINK)[None, :]
    target = chunk_out_ptr + ((chunk * T + token) * (H * G) + head * G + g) * D
    tl.store(target[None, :] + dims[:, None], out, mask=(dims < D)[:, None] & (there & (g < G))[None, :])


@triton.jit
def merge(
    chunk_out_ptr,
    coded_lse_ptr,
    offset_ptr,
    value_mean_ptr,
    value_stretch_ptr,
    part_out_ptr,
    part_lse_ptr,
    out_ptr,
    out_stride_t,
    out_stride_h,
    lse_ptr,
    HEAD_GROUPS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    G: tl.constexpr,
    ROW: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNKS_PAD: tl.constexpr,
    TAIL_PARTS: tl.constexpr,
):
    """Codes and tail of one query head: out and natural log-sum-exp."""
    token, query_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    T, Hq = tl.num_programs(0), tl.num_programs(1)
    head, g = query_head // G, query_head % G
    dims, chunk, part = tl.arange(0, D_PAD), tl.arange(0, CHUNKS_PAD), tl.arange(0, TAIL_PARTS)
    row = token * Hq + query_head
    block = (token * (Hq // G) + head) * ROW + g
    coded = tl.load(coded_lse_ptr + block) + tl.load(offset_ptr + block)
    has_codes = coded > -float("inf")
    tails = tl.load(part_lse_ptr + row * TAIL_PARTS + part)
    has_tail = tails > -float("inf")
    top = tl.maximum(tl.max(tails, 0), coded)
    coded_weight = tl.where(has_codes, tl.exp2(coded - top), 0.0)
    weights = tl.where(has_tail, tl.exp2(tails - top), 0.0)
    total = tl.sum(weights, 0) + coded_weight
    mask = (chunk < CHUNKS)[:, None] & (dims < D)[None, :]  # zeros where there are no codes, and no wait to know it
    chunks = chunk_out_ptr + ((chunk * T + token) * Hq + query_head)[:, None] * D + dims[None, :]
    mean = tl.load(value_mean_ptr + head // HEAD_GROUPS * D + dims, mask=dims < D, other=0.0)
    stretch = tl.load(value_stretch_ptr + head // HEAD_GROUPS * D + dims, mask=dims < D, other=0.0)
    acc = (tl.sum(tl.load(chunks, mask=mask, other=0.0), 0) * stretch + mean) * coded_weight
    parts = part_out_ptr + (row * TAIL_PARTS + part)[:, None] * D + dims[None, :]
    acc += tl.sum(tl.load(parts, mask=(dims < D)[None, :], other=0.0) * weights[:, None], 0)
    out = acc / tl.where(total > 0, total, 1.0)
    target = out_ptr + token * out_stride_t + query_head * out_stride_h + dims
    tl.store(target, out.to(out_ptr.dtype.element_ty), mask=dims < D)
    tl.store(lse_ptr + row, tl.where(total > 0, (top + tl.log2(total)) * LN_2, -float("inf")))
