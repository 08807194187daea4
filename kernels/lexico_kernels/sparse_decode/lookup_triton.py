"""What surrounds `attend_codes` in `lookup.sparse_decode`, in Triton: products with the atoms and the tail.

A pass goes over a KV head's codes for G query heads, the last of a KV head for what is left of its GROUP; H passes
serve a token, PASSES of them share a KV head. ROW is G up to a power of two. A column is a token's query head:
COLUMNS // ROW tokens go through one program, in columns [token, head of the pass]. H is no constant: parts of a layer
have other numbers of heads, and nothing but addresses depends on it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels.device.records import load_of_head
from lexico_kernels.memory import layout
from lexico_kernels.sparse_decode.softmax import attend_raw, empty_state, load_queries

# Bins come as halves up to 2^15. Those of all splits of a context are added up and must stay finite as halves.
BIN_SHRINK = tl.constexpr(1 / 1024)
SPAN_TOKENS = tl.constexpr(layout.SPAN_TOKENS)


class Heads(NamedTuple):
    """Compile-time constants: which query heads go over the codes together."""

    PASSES: int  # of a KV head
    G: int  # query heads of a pass
    ROW: int
    GROUP: int  # query heads of a KV head, at most PASSES * G


class Lookups(NamedTuple):
    """What `prepare` leaves for the other kernels, see `Shape.scratch`."""

    lookup: Tensor  # halves [T, H, N, ROW]
    query_scale: Tensor  # float32 [T, H, ROW]
    offset: Tensor  # float32 [T, H, ROW]
    schedule: Tensor  # int32 [T, 4]


class Partial(NamedTuple):
    """A part of the softmax for each query head, to be merged."""

    out: Tensor  # float32 [..., D]
    lse: Tensor  # float32, in base 2


class LookupTiles(NamedTuple):
    """Compile-time constants of `prepare`."""

    COLUMNS: int
    ATOMS: int  # of a tile
    TILES: int  # of atoms that one program goes through
    SPLIT: int  # tokens of a split at most
    SHORT_SPLIT: int
    SHORT_CONTEXT: int
    TAIL_SPLITS: int
    TAIL: int  # tokens of a tile
    G_PAD: int
    CAP: float  # of scores in base 2, see `soft_capped`


class BinTiles(NamedTuple):
    """Compile-time constants of `multiply_bins`."""

    COLUMNS: int
    SPLITS_PAD: int
    SPLITS_AT_ONCE: int
    CHUNK: int
    ATOMS: int  # of a tile


@triton.jit
def columns(block, T, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """Token and head of each column, and whether there is such a token."""
    ROW: tl.constexpr = HEADS.ROW
    column = tl.arange(0, COLUMNS)
    token = block * (COLUMNS // ROW) + column // ROW
    return token.to(tl.int64), column % ROW, token < T


@triton.jit
def load_atom_tile(book, kv_head, atom, KV: tl.constexpr, SIZES: tl.constexpr):
    """Atoms of a head as [TILE, D_PAD], 0 beyond the dictionary."""
    OWN: tl.constexpr = SIZES.kv[KV]
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    dims = tl.arange(0, D_PAD)
    mask = (atom < OWN.N)[:, None] & (dims < D)[None, :]
    rows = book.atoms + kv_head * OWN.HEAD_STRIDE + atom[:, None] * D + dims[None, :]
    return tl.load(rows, mask=mask, other=0.0)


@triton.jit
def _write_schedule(token, there, own, tables, request_ptr, seq_len_ptr, schedule_ptr, TILES: tl.constexpr):
    """Where each token's coded context begins and ends, tokens of a split, and splits.

    It follows from the context's own length alone: up to SHORT_CONTEXT tokens in splits of SHORT_SPLIT at most, longer
    ones in splits of SPLIT at most, all of one size. Splits begin where spans of ordered records do.
    """
    request = tl.load(request_ptr + token, mask=there, other=0).to(tl.int64)
    first = tl.load(tables.sink_end + request)
    end = tl.minimum(tl.load(tables.raw_start + request), tl.load(seq_len_ptr + token, mask=there, other=0))
    count = tl.where(end > first, end - first // SPAN_TOKENS * SPAN_TOKENS, 0)
    splits = tl.cdiv(count, tl.where(count > TILES.SHORT_CONTEXT, TILES.SPLIT, TILES.SHORT_SPLIT))
    tokens = tl.cdiv(tl.cdiv(count, tl.maximum(splits, 1)), SPAN_TOKENS) * SPAN_TOKENS
    splits = tl.cdiv(count, tl.maximum(tokens, 1))
    schedule = schedule_ptr + token * 4
    tl.store(schedule, first, mask=own)
    tl.store(schedule + 1, end, mask=own)
    tl.store(schedule + 2, tokens, mask=own)
    tl.store(schedule + 3, splits, mask=own)


@triton.jit
def _make_lookups(
    tile,
    head,
    block,
    query,
    book,
    tables,
    request_ptr,
    seq_len_ptr,
    lookups,
    factor,
    T,
    H,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Products of atoms and stretched queries of length 1, and what makes scores of them."""
    OWN: tl.constexpr = SIZES.kv[0]
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    G: tl.constexpr = HEADS.G
    ROW: tl.constexpr = HEADS.ROW
    token, g, there = columns(block, T, HEADS, TILES.COLUMNS)
    dims = tl.arange(0, D_PAD)
    kv_head = head // HEADS.PASSES
    within = head % HEADS.PASSES * G + g
    used = there & (g < G) & (within < HEADS.GROUP)
    q_ptr = query.data + token * query.token_stride + (kv_head * HEADS.GROUP + within) * query.head_stride
    q = tl.load(q_ptr[None, :] + dims[:, None], mask=(dims < D)[:, None] & used[None, :], other=0.0)
    wide = q.to(tl.float32)
    stretched = wide * load_of_head(book.stretch, kv_head, SIZES)[:, None]
    length = tl.sqrt(tl.sum(stretched * stretched, 0))
    unit = (stretched * tl.where(length > 0, 1 / length, 0.0)[None, :]).to(tl.float16)
    row = token * H + head
    target = lookups.lookup + (row * (OWN.N * ROW) + g)[None, :]
    for turn in range(TILES.TILES):
        atom = (tile * TILES.TILES + turn) * TILES.ATOMS + tl.arange(0, TILES.ATOMS)
        atoms = load_atom_tile(book, kv_head, atom, 0, SIZES)
        products = tl.dot(atoms.to(tl.float16), unit)  # numbers up to 1, of which halves keep more than bfloat16
        tl.store(target + atom[:, None] * ROW, products.to(tl.float16), mask=(atom < OWN.N)[:, None] & there[None, :])
    if tile == 0:
        mean = load_of_head(book.mean, kv_head, SIZES)
        tl.store(lookups.query_scale + row * ROW + g, length * factor, mask=there)
        tl.store(lookups.offset + row * ROW + g, tl.sum(wide * mean[:, None], 0) * factor, mask=there)
        if head == 0:
            own = there & (g == 0)
            _write_schedule(token, there, own, tables, request_ptr, seq_len_ptr, lookups.schedule, TILES)


@triton.jit
def _attend_tail(
    token,
    head,
    split,
    query,
    tail,
    tables,
    request_ptr,
    seq_len_ptr,
    partial,
    factor,
    H,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
):
    """One split of one token's raw context: normalised output [T, H * G, SPLITS, D] and base-2 log-sum-exp.

    Split p takes the p-th share of the window, the last one the sinks too, so that splits are alike.
    """
    D: tl.constexpr = SIZES.D
    G: tl.constexpr = HEADS.G
    SPLITS: tl.constexpr = TILES.TAIL_SPLITS
    TILE: tl.constexpr = TILES.TAIL
    CAP: tl.constexpr = TILES.CAP
    heads, dims = tl.arange(0, TILES.G_PAD), tl.arange(0, SIZES.D_PAD)
    request = tl.load(request_ptr + token).to(tl.int64)
    seq_len = tl.load(seq_len_ptr + token)
    sinks = tl.minimum(tl.load(tables.sink_end + request), seq_len)
    first = tl.minimum(tl.maximum(tl.load(tables.raw_start + request), sinks), seq_len)
    kv_head = head // HEADS.PASSES
    within = head % HEADS.PASSES * G
    count = tl.minimum(G, HEADS.GROUP - within)
    q, mask = load_queries(query, token, kv_head * HEADS.GROUP + within, heads, SIZES, count)
    state = empty_state(TILES.G_PAD, SIZES.D_PAD)
    tails = tables.tail_block_table + request * tables.tail_block_table_stride
    if split == SPLITS - 1:
        state = attend_raw(q, state, 0, sinks, tail, tails, kv_head, factor, SIZES, TILE, CAP)
    size = tl.cdiv(tl.cdiv(seq_len - first, SPLITS), TILE) * TILE
    start = first + split * size
    end = tl.minimum(start + size, seq_len)
    state = attend_raw(q, state, start, end, tail, tails, kv_head, factor, SIZES, TILE, CAP)
    top, total, acc = state
    out_row = (token * H * G + head * G + heads) * SPLITS + split
    empty = total == 0
    tl.store(partial.out + out_row[:, None] * D + dims[None, :], acc / tl.where(empty, 1.0, total)[:, None], mask=mask)
    tl.store(partial.lse + out_row, tl.where(empty, -float("inf"), top + tl.log2(total)), mask=heads < G)


@triton.jit(do_not_specialize=["request_ptr", "seq_len_ptr", "T", "H"])
def prepare(
    query,
    book,
    tail,
    tables,
    request_ptr,
    seq_len_ptr,
    lookups,
    partial,
    factor,
    T,
    H,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
):
    """What needs nothing but the query, side by side: the first T * H * TAIL_SPLITS programs attend the raw context,
    the others make lookups of the keys' atoms."""
    SPLITS: tl.constexpr = TILES.TAIL_SPLITS
    program = tl.program_id(0)
    tails = T * (H * SPLITS)
    if program < tails:
        token, head, split = (program // (H * SPLITS)).to(tl.int64), program // SPLITS % H, program % SPLITS
        _attend_tail(
            token, head, split, query, tail, tables, request_ptr, seq_len_ptr, partial, factor, H, SIZES, HEADS, TILES
        )
    else:
        PROGRAM_ATOMS: tl.constexpr = TILES.ATOMS * TILES.TILES
        ATOM_TILES: tl.constexpr = (SIZES.kv[0].N + PROGRAM_ATOMS - 1) // PROGRAM_ATOMS
        program -= tails
        tile, head, block = program % ATOM_TILES, program // ATOM_TILES % H, program // (ATOM_TILES * H)
        _make_lookups(
            tile, head, block, query, book, tables, request_ptr, seq_len_ptr, lookups, factor, T, H, SIZES, HEADS, TILES
        )


@triton.jit
def _top_and_unit(
    row, splits, used_head, g, stats_ptr, stats_stride, max_splits, SPLITS_PAD: tl.constexpr, ROW: tl.constexpr
):
    """Of each column: the largest score, and the worth of a unit of its bins."""
    split = tl.arange(0, SPLITS_PAD)
    exists = (split[:, None] < splits[None, :]) & used_head[None, :]
    at = stats_ptr + (row * max_splits)[None, :] * ROW + split[:, None] * ROW + g[None, :]
    tops = tl.load(at, mask=exists, other=-float("inf"))
    top = tl.max(tops, 0)
    shift = tl.where(exists, tl.exp2(tops - top[None, :]), 0.0)
    return top, tl.max(shift * tl.load(at + 2 * stats_stride, mask=exists, other=0.0), 0)


@triton.jit
def _merge_bins(
    bins_ptr,
    stats_ptr,
    stats_stride,
    row,
    splits,
    most,
    max_splits,
    g,
    atom,
    top,
    unit,
    N: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
):
    """The splits' bins of a tile of atoms, added up, float32 [TILE, COLUMNS]; most: splits of any column."""
    G: tl.constexpr = HEADS.G
    ROW: tl.constexpr = HEADS.ROW
    TILE: tl.constexpr = TILES.ATOMS
    COLUMNS: tl.constexpr = TILES.COLUMNS
    AT_ONCE: tl.constexpr = TILES.SPLITS_AT_ONCE
    bins = tl.zeros([TILE, COLUMNS], tl.float32)
    for first_split in range(0, most, AT_ONCE):
        for later in tl.static_range(AT_ONCE):  # one by one: a sum over an axis goes through other lanes
            some = first_split + later
            used = (some < splits) & (g < G)
            at = row * max_splits + some
            stat = stats_ptr + at * ROW + g
            worth = tl.load(stat + 2 * stats_stride, mask=used, other=0.0)
            worth *= tl.where(used, tl.exp2(tl.load(stat, mask=used, other=0.0) - top), 0.0)
            worth = worth / tl.where(unit > 0, unit, 1.0) * BIN_SHRINK
            source = bins_ptr + (at * G + g)[None, :] * N + atom[:, None]
            values = tl.load(source, mask=used[None, :] & (atom < N)[:, None], other=0.0)
            bins += values.to(tl.float32) * worth[None, :]
    return bins


@triton.jit(do_not_specialize=["T"])
def multiply_bins(
    schedule_ptr,
    bins_ptr,
    stats_ptr,
    book,
    chunk_out_ptr,
    T,
    max_splits,
    SIZES: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Merge the splits' bins, halves [T, H, max_splits, G, N], of a chunk of atoms and multiply them with the atoms.

    chunk_out: float32 [chunks, T, H * G, D], to be added up and divided by the sum of weights. How many columns go
    through a program changes no bits: nothing but maxima is taken over an axis.
    """
    OWN: tl.constexpr = SIZES.kv[1]
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    G: tl.constexpr = HEADS.G
    ROW: tl.constexpr = HEADS.ROW
    N: tl.constexpr = OWN.N
    CHUNK: tl.constexpr = TILES.CHUNK
    TILE: tl.constexpr = TILES.ATOMS
    COLUMNS: tl.constexpr = TILES.COLUMNS
    chunk, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    H = tl.num_programs(1)
    token, g, there = columns(block, T, HEADS, COLUMNS)
    dims = tl.arange(0, D_PAD)
    stats_stride = T * H * max_splits * ROW  # from one kind to the next
    row = token * H + head
    splits = tl.load(schedule_ptr + token * 4 + 3, mask=there, other=0)
    top, unit = _top_and_unit(row, splits, g < G, g, stats_ptr, stats_stride, max_splits, TILES.SPLITS_PAD, ROW)
    most = tl.max(splits, 0)
    atoms_ptr = book.atoms + (head // HEADS.PASSES) * OWN.HEAD_STRIDE
    out = tl.zeros([D_PAD, COLUMNS], tl.float32)
    if most <= 1:  # nothing to merge: a loop without another within, which is pipelined
        used = (splits > 0) & (g < G)
        own_bins = bins_ptr + (row * max_splits * G + g) * N
        for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, N), TILE):
            atom = first + tl.arange(0, TILE)
            mask = (dims < D)[:, None] & (atom < N)[None, :]
            atoms = tl.load(atoms_ptr + atom[None, :] * D + dims[:, None], mask=mask, other=0.0)
            bins = tl.load(own_bins[None, :] + atom[:, None], mask=used[None, :] & (atom < N)[:, None], other=0.0)
            bins = bins.to(tl.float32) * BIN_SHRINK
            out = tl.dot(atoms.to(tl.float16), bins.to(tl.float16), out)
    else:
        for first in range(chunk * CHUNK, min(chunk * CHUNK + CHUNK, N), TILE):
            atom = first + tl.arange(0, TILE)
            mask = (dims < D)[:, None] & (atom < N)[None, :]
            atoms = tl.load(atoms_ptr + atom[None, :] * D + dims[:, None], mask=mask, other=0.0)
            bins = _merge_bins(
                bins_ptr, stats_ptr, stats_stride, row, splits, most, max_splits, g, atom, top, unit, N, HEADS, TILES
            )
            out = tl.dot(atoms.to(tl.float16), bins.to(tl.float16), out)
    out *= (unit / BIN_SHRINK)[None, :]
    target = chunk_out_ptr + ((chunk * T + token) * (H * G) + head * G + g) * D
    tl.store(target[None, :] + dims[:, None], out, mask=(dims < D)[:, None] & (there & (g < G))[None, :])
