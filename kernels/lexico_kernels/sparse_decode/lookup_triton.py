"""What comes before `attend_codes` in `lookup.sparse_decode`, in Triton: products with the keys' atoms, and the tail.

A pass goes over a KV head's codes for G query heads, the last of a KV head for what is left of its GROUP; H passes
serve a token, PASSES of them share a KV head. ROW is G up to a power of two. A column is a token's query head:
COLUMNS // ROW tokens go through one program, in columns [token, head of the pass]. H is no constant: parts of a layer
have other numbers of heads, and nothing but addresses depends on it.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels.device.overlap import trigger_next, wait_for_previous
from lexico_kernels.device.records import SPAN_TOKENS, load_of_head
from lexico_kernels.sparse_decode.softmax import attend_raw, empty_state, load_queries

G_PAD = tl.constexpr(16)  # rows of a product of queries, the fewest that there can be; a pass has fewer


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
    CAP: float  # of scores in base 2, see `soft_capped`
    OVERLAP: bool


@triton.jit
def columns(block, T, HEADS: tl.constexpr, COLUMNS: tl.constexpr):
    """Token and head of each column, and whether there is such a token."""
    ROW: tl.constexpr = HEADS.ROW
    column = tl.arange(0, COLUMNS)
    token = block * (COLUMNS // ROW) + column // ROW
    return token.to(tl.int64), column % ROW, token < T


@triton.jit
def load_key_atoms(book, kv_head, atom, SIZES: tl.constexpr):
    """Atoms of a head's keys as [TILE, D_PAD], 0 beyond the dictionary."""
    OWN: tl.constexpr = SIZES.kv[0]
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
    OVERLAP: tl.constexpr = TILES.OVERLAP
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
        atoms = load_key_atoms(book, kv_head, atom, SIZES)
        products = tl.dot(atoms.to(tl.float16), unit)  # numbers up to 1, of which halves keep more than bfloat16
        tl.store(target + atom[:, None] * ROW, products.to(tl.float16), mask=(atom < OWN.N)[:, None] & there[None, :])
    trigger_next(OVERLAP)
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
    OVERLAP: tl.constexpr = TILES.OVERLAP
    heads, dims = tl.arange(0, G_PAD), tl.arange(0, SIZES.D_PAD)
    request = tl.load(request_ptr + token).to(tl.int64)
    seq_len = tl.load(seq_len_ptr + token)
    sinks = tl.minimum(tl.load(tables.sink_end + request), seq_len)
    first = tl.minimum(tl.maximum(tl.load(tables.raw_start + request), sinks), seq_len)
    kv_head = head // HEADS.PASSES
    within = head % HEADS.PASSES * G
    count = tl.minimum(G, HEADS.GROUP - within)
    q, mask = load_queries(query, token, kv_head * HEADS.GROUP + within, heads, SIZES, count)
    state = empty_state(G_PAD, SIZES.D_PAD)
    tails = tables.tail_block_table + request * tables.tail_block_table_stride
    if split == SPLITS - 1:
        state = attend_raw(q, state, 0, sinks, tail, tails, kv_head, factor, SIZES, TILE, CAP)
    size = tl.cdiv(tl.cdiv(seq_len - first, SPLITS), TILE) * TILE
    start = first + split * size
    end = tl.minimum(start + size, seq_len)
    state = attend_raw(q, state, start, end, tail, tails, kv_head, factor, SIZES, TILE, CAP)
    trigger_next(OVERLAP)
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
    OVERLAP: tl.constexpr = TILES.OVERLAP
    wait_for_previous(OVERLAP)
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
