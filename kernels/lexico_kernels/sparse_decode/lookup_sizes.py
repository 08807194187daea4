"""Sizes of decoding through lookups: what its steps, its compiled kernel and whoever reserves memory ask."""

from dataclasses import dataclass
from functools import cache as once
from typing import NamedTuple

import torch

from lexico_kernels.device.launch import (
    LOOKUP_ATTEND,
    LOOKUP_BINS_SPLITS,
    LOOKUP_BINS_TURNS,
    LOOKUP_CHUNKS,
    LOOKUP_ONE_PASS,
    LOOKUP_SCRATCH_BYTES,
    LOOKUP_SPLITS,
    LOOKUP_TAIL,
    lookup_bins,
    lookup_launch,
)
from lexico_kernels.device.nvrtc import float_bits
from lexico_kernels.memory import records
from lexico_kernels.memory.layout import MAX_ATOMS, CodeLayout

MAX_QUERIES = 8  # query heads that one pass over the codes can serve
MAX_GRID_ROWS = 65535  # CUDA's limit on a grid's second axis


def divide_up(count: int, size: int) -> int:
    """How many of that size hold the count."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The count up to a power of two."""
    return 1 << (count - 1).bit_length()


class Pass(NamedTuple):
    """What a pass over a KV head's codes takes at a time.

    Attributes:
        passes: over the codes, each for as many of the KV head's query heads; the last may have fewer.
        binned: query heads that have bins at a time: all of a pass, or as many as have room, and values are read again
            for the next.
        tokens: of a split at most.
    """

    passes: int
    binned: int
    tokens: int


@dataclass(frozen=True)
class Shape:
    """What a launch's sizes follow from.

    Attributes:
        layout: of the pages.
        num_heads: Hq.
        key_atoms, value_atoms: N of both dictionaries.
        max_splits: of a context.
        way: of the passes over a KV head's codes.
        cap: of scores in base 2 (`reference.sparse_decode` has it in base e), 0 for none.
    """

    layout: CodeLayout
    num_heads: int
    key_atoms: int
    value_atoms: int
    max_splits: int
    way: Pass
    cap: float = 0.0

    @property
    def token_passes(self) -> int:
        """H, passes of a token."""
        return self.layout.num_kv_heads * self.way.passes

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_heads // self.layout.num_kv_heads

    @property
    def queries(self) -> int:
        """G, query heads of a pass; where passes do not divide the group, the last has room for more than it has."""
        return divide_up(self.group, self.way.passes)

    @property
    def row(self) -> int:
        """G up to a power of two."""
        return power_of_two(self.queries)

    @property
    def chunk(self) -> int:
        """Atoms of a block of `multiply_bins`; of the longest context alone, so that batches change no bits."""
        return next(row.atoms for row in LOOKUP_CHUNKS if self.max_splits <= row.max_splits)

    @property
    def chunks(self) -> int:
        """Shares of the atoms that `multiply_bins` takes apart."""
        return divide_up(self.value_atoms, self.chunk)

    def scratch(self) -> dict[str, tuple[int, torch.dtype]]:
        """Numbers that a token needs of each buffer, and their type."""
        heads, padded = self.token_passes * self.row, self.token_passes * self.queries
        return {
            "lookup": (heads * self.key_atoms, torch.float16),
            "bins": (padded * self.max_splits * self.value_atoms, torch.float16),
            "stats": (3 * heads * self.max_splits, torch.float32),
            "query_scale": (heads, torch.float32),
            "offset": (heads, torch.float32),
            "chunk_out": (self.chunks * padded * self.layout.head_dim, torch.float32),
            "tail_out": (padded * LOOKUP_TAIL.splits * self.layout.head_dim, torch.float32),
            "tail_lse": (padded * LOOKUP_TAIL.splits, torch.float32),
            "schedule": (4, torch.int32),
        }

    def token_bytes(self) -> int:
        """Scratch of one token."""
        return sum(count * dtype.itemsize for count, dtype in self.scratch().values())

    def slice_tokens(self) -> int:
        """Tokens that are done at a time."""
        return max(1, min(LOOKUP_SCRATCH_BYTES // self.token_bytes(), MAX_GRID_ROWS // self.token_passes))


def max_splits(max_tokens: int, split_tokens: int) -> int:
    """Most splits of a context of at most that many tokens; what `prepare` schedules is never more."""
    short = divide_up(min(max_tokens, LOOKUP_SPLITS.short_context), min(LOOKUP_SPLITS.short_tokens, split_tokens))
    return max(1, short, divide_up(max_tokens, split_tokens))


def shared_bytes(queries: int, key_atoms: int, value_atoms: int, way: Pass) -> int:
    """Dynamic shared memory of a block of `attend_codes`: lookup or weights, and scores or bins."""
    threads = lookup_launch(queries).threads
    tokens = divide_up(way.tokens, threads) * threads
    lookup = divide_up(max(key_atoms, tokens) * power_of_two(queries) * 2, 16) * 16
    return lookup + max(queries * tokens, way.binned * value_atoms) * 4


@once
def way_for(group: int, key_atoms: int, value_atoms: int, limit_bytes: int) -> Pass | None:
    """As few passes over a KV head's codes as fit shared memory with their share of `group` query heads; or None.

    Large groups go in passes of four heads at most, which are faster. Of ways with as many passes, the one
    that has the bins of most query heads at a time, and of those the one with the longest splits.
    """
    least = 1 if group <= LOOKUP_ONE_PASS else divide_up(group, LOOKUP_ATTEND[0].max_queries)
    for passes in range(least, group + 1):
        queries = divide_up(group, passes)
        if queries > MAX_QUERIES or divide_up(group, queries) < passes:
            continue
        for turns in range(1, queries + 1):
            for tokens in (LOOKUP_SPLITS.tokens, *LOOKUP_SPLITS.fewer_tokens):
                way = Pass(passes, divide_up(queries, turns), tokens)
                shared = shared_bytes(queries, key_atoms, value_atoms, way)
                if shared + LOOKUP_SPLITS.static_bytes <= limit_bytes:
                    return way
    return None


@once
def shape_for(
    layout: CodeLayout,
    num_heads: int,
    key_atoms: int,
    value_atoms: int,
    max_tokens: int,
    limit_bytes: int,
    cap: float = 0.0,
) -> Shape | None:
    """The shape for contexts of at most `max_tokens`; None if they, or the query heads, do not fit shared memory."""
    way = way_for(num_heads // layout.num_kv_heads, key_atoms, value_atoms, limit_bytes)
    if way is None:
        return None
    shape = Shape(layout, num_heads, key_atoms, value_atoms, max_splits(max_tokens, way.tokens), way, cap)
    return shape if bins_fit(shape, limit_bytes) else None


def constants(shape: Shape, limit_bytes: int, overlap: bool = False) -> dict[str, int]:
    """The macros of `attend_codes`; overlap: it starts before the kernel before it has ended."""
    queries = shape.queries
    launch = lookup_launch(queries)
    shared = shared_bytes(queries, shape.key_atoms, shape.value_atoms, shape.way) + LOOKUP_SPLITS.static_bytes
    return records.macros(shape.layout) | {
        "QUERIES": queries,
        "ROW": shape.row,
        "BINNED": shape.way.binned,
        "THREADS": launch.threads,
        "ROUNDS": divide_up(shape.way.tokens, launch.threads),
        "MIN_BLOCKS": max(1, min(limit_bytes // shared, launch.max_blocks)),
        "LEVELS_FROM": launch.levels_from,
        "PASSES": shape.way.passes,
        "MAX_ATOMS": MAX_ATOMS,
        "CAP_BITS": float_bits(shape.cap),
        "KEY_ATOMS": shape.key_atoms,
        "VALUE_ATOMS": shape.value_atoms,
        "OVERLAPS": int(overlap),
    }


MAX_SPLITS = 2048  # of a context, whose bins `multiply_bins` adds up as halves
BINS_TILE, BINS_PIECE = 64, 8  # atoms that `multiply_bins` multiplies together, and of which a thread merges the bins


class BinsWay(NamedTuple):
    """How a block of `multiply_bins` goes through its share of the atoms.

    Attributes:
        columns: query heads of tokens.
        splits: whose bins a thread loads at once.
        turns: pieces of each tile whose bins a thread merges.
    """

    columns: int
    splits: int
    turns: int

    @property
    def threads(self) -> int:
        """Of the block."""
        return self.columns * (BINS_TILE // BINS_PIECE) // self.turns


def bins_shared_bytes(shape: Shape, way: BinsWay) -> int:
    """Shared memory of a block of `multiply_bins`: tiles of atoms, two of bins, and the worth of each split."""
    atoms, bins = BINS_TILE * (2 * shape.layout.head_dim + 16), way.columns * (2 * BINS_TILE + 16)
    return 2 * (atoms + bins) + 4 * way.columns * (1 + shape.max_splits)


@once
def bins_way(shape: Shape, num_tokens: int, limit_bytes: int) -> BinsWay:
    """For a step of that many tokens, where a block may have `limit_bytes` of shared memory.

    Very long contexts have so many splits that only fewer columns fit. The columns change no bits.
    """
    splits, turns = min(LOOKUP_BINS_SPLITS, power_of_two(shape.max_splits)), 1
    if shape.max_splits == 1:
        turns = LOOKUP_BINS_TURNS
    way = BinsWay(lookup_bins(num_tokens * shape.row).columns, splits, turns)
    while way.columns > 16 and bins_shared_bytes(shape, way) > limit_bytes:
        way = way._replace(columns=way.columns // 2)
    return way


def bins_fit(shape: Shape, limit_bytes: int) -> bool:
    """Whether a context's splits are not too many for `multiply_bins`."""
    return shape.max_splits <= MAX_SPLITS and bins_shared_bytes(shape, bins_way(shape, 1, limit_bytes)) <= limit_bytes


def bins_constants(shape: Shape, way: BinsWay, half: bool, overlap: bool = False) -> dict[str, int]:
    """The macros of `multiply_bins`; half: atoms are float16, not bfloat16."""
    return {
        "QUERIES": shape.queries,
        "ROW": shape.row,
        "PASSES": shape.way.passes,
        "ATOMS": shape.value_atoms,
        "DIM": shape.layout.head_dim,
        "COLUMNS": way.columns,
        "TILE": BINS_TILE,
        "PIECE": BINS_PIECE,
        "CHUNK": shape.chunk,
        "AT_ONCE": way.splits,
        "TURNS": way.turns,
        "ATOMS_ARE_HALF": int(half),
        "OVERLAPS": int(overlap),
    }


def scratch_bytes(layout: CodeLayout, num_heads: int, num_tokens: int, max_tokens: int) -> int:
    """Most scratch that a step of that many tokens takes, whatever its dictionaries; contexts reach `max_tokens`."""
    most, shortest = 0, min(LOOKUP_SPLITS.fewer_tokens)
    for passes in range(1, num_heads // layout.num_kv_heads + 1):  # the device says which
        way = Pass(passes, 1, shortest)
        shape = Shape(layout, num_heads, MAX_ATOMS, MAX_ATOMS, max_splits(max_tokens, shortest), way)
        most = max(most, shape.token_bytes())
    return min(num_tokens * most, max(LOOKUP_SCRATCH_BYTES, most))
