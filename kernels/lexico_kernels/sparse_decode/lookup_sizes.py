"""Sizes of decoding through lookups: what its steps, its compiled kernel and whoever reserves memory ask."""

from dataclasses import dataclass
from functools import cache as once
from math import gcd

import torch

from lexico_kernels.device.launch import (
    LOOKUP_MATMUL,
    LOOKUP_SCRATCH_BYTES,
    LOOKUP_SPLITS,
    LOOKUP_TAIL,
    LookupLaunch,
    lookup_launch,
)
from lexico_kernels.device.nvrtc import float_bits
from lexico_kernels.memory.layout import KV, LEVEL_BITS, MAX_ATOMS, NUM_LEVELS, SPAN_TOKENS, CodeLayout

MAX_QUERIES = 8  # query heads that one pass over the codes can serve
NO_LIMIT_BYTES = 1 << 30
MAX_GRID_ROWS = 65535  # CUDA's limit on a grid's second axis


def divide_up(count: int, size: int) -> int:
    """How many of that size hold the count."""
    return -(-count // size)


def power_of_two(count: int) -> int:
    """The count up to a power of two."""
    return 1 << (count - 1).bit_length()


@dataclass(frozen=True)
class Shape:
    """What a launch's sizes follow from.

    Attributes:
        layout: of the pages.
        num_heads: Hq.
        key_atoms, value_atoms: N of both dictionaries.
        max_splits: of a context.
        passes: over a KV head's codes, each for as many of its query heads.
        cap: of scores in base 2 (`reference.sparse_decode` has it in base e), 0 for none.
    """

    layout: CodeLayout
    num_heads: int
    key_atoms: int
    value_atoms: int
    max_splits: int
    passes: int
    cap: float = 0.0

    @property
    def token_passes(self) -> int:
        """H, passes of a token."""
        return self.layout.num_kv_heads * self.passes

    @property
    def queries(self) -> int:
        """G, query heads of a pass."""
        return self.num_heads // self.token_passes

    @property
    def row(self) -> int:
        """G up to a power of two."""
        return power_of_two(self.queries)

    @property
    def chunk(self) -> int:
        """Atoms of a program of `multiply_bins`; of the longest context alone, so that batches change no bits."""
        return LOOKUP_MATMUL.long_chunk if self.max_splits >= LOOKUP_MATMUL.long_splits else LOOKUP_MATMUL.chunk

    @property
    def chunks(self) -> int:
        """Shares of the atoms that `multiply_bins` takes apart."""
        return divide_up(self.value_atoms, self.chunk)

    def scratch(self) -> dict[str, tuple[int, torch.dtype]]:
        """Numbers that a token needs of each buffer, and their type."""
        heads = self.token_passes * self.row
        return {
            "lookup": (heads * self.key_atoms, torch.float16),
            "bins": (self.num_heads * self.max_splits * self.value_atoms, torch.float16),
            "stats": (3 * heads * self.max_splits, torch.float32),
            "query_scale": (heads, torch.float32),
            "offset": (heads, torch.float32),
            "coded_lse": (heads, torch.float32),
            "chunk_out": (self.chunks * self.num_heads * self.layout.head_dim, torch.float32),
            "tail_out": (self.num_heads * LOOKUP_TAIL.splits * self.layout.head_dim, torch.float32),
            "tail_lse": (self.num_heads * LOOKUP_TAIL.splits, torch.float32),
            "schedule": (4, torch.int32),
        }

    def token_bytes(self) -> int:
        """Scratch of one token."""
        return sum(count * dtype.itemsize for count, dtype in self.scratch().values())

    def slice_tokens(self) -> int:
        """Tokens that are done at a time."""
        return max(1, min(LOOKUP_SCRATCH_BYTES // self.token_bytes(), MAX_GRID_ROWS // self.token_passes))


def max_splits(max_tokens: int) -> int:
    """Most splits of a context of at most that many tokens; what `prepare` schedules is never more."""
    short = divide_up(min(max_tokens, LOOKUP_SPLITS.short_context), LOOKUP_SPLITS.short_tokens)
    return max(1, short, divide_up(max_tokens, LOOKUP_SPLITS.tokens))


def shared_bytes(launch: LookupLaunch, queries: int, key_atoms: int, value_atoms: int) -> int:
    """Dynamic shared memory of a block of `attend_codes`: lookup or weights, and scores or bins."""
    tokens = divide_up(LOOKUP_SPLITS.tokens, launch.threads) * launch.threads
    lookup = divide_up(max(key_atoms, tokens) * power_of_two(queries) * 2, 16) * 16
    return lookup + queries * max(value_atoms, tokens) * 4


def passes_for(queries_per_kv_head: int, key_atoms: int, value_atoms: int, limit_bytes: int) -> int:
    """Passes over a KV head's codes: as few as fit shared memory with their query heads; 0 if none do."""
    for passes in range(1, queries_per_kv_head + 1):
        queries = queries_per_kv_head // passes
        if queries_per_kv_head % passes == 0 and queries <= MAX_QUERIES:
            shared = shared_bytes(lookup_launch(queries), queries, key_atoms, value_atoms)
            if shared + LOOKUP_SPLITS.static_bytes <= limit_bytes:
                return passes
    return 0


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
    """The shape for contexts of at most `max_tokens`, or None if the query heads do not fit shared memory."""
    passes = passes_for(num_heads // layout.num_kv_heads, key_atoms, value_atoms, limit_bytes)
    return Shape(layout, num_heads, key_atoms, value_atoms, max_splits(max_tokens), passes, cap) if passes else None


def constants(shape: Shape, launch: LookupLaunch, page_alignment: int, limit_bytes: int) -> dict[str, int]:
    """The macros of `attend_codes`."""
    layout, queries = shape.layout, shape.queries
    shared = shared_bytes(launch, queries, shape.key_atoms, shape.value_atoms) + LOOKUP_SPLITS.static_bytes
    out = {
        "QUERIES": queries,
        "ROW": shape.row,
        "ROTATE": launch.rotate if power_of_two(queries) == queries else 0,
        "THREADS": launch.threads,
        "ROUNDS": divide_up(LOOKUP_SPLITS.tokens, launch.threads),
        "MIN_BLOCKS": max(1, min(limit_bytes // shared, launch.max_blocks)),
        "LEVELS_FROM": launch.levels_from,
        "PAGE_TOKENS": layout.block_tokens,
        "HEAD_BYTES": layout.head_bytes,
        "PASSES": shape.passes,
        "NUM_LEVELS": NUM_LEVELS,
        "LEVEL_BITS": LEVEL_BITS,
        "MAX_ATOMS": MAX_ATOMS,
        "SPAN_TOKENS": SPAN_TOKENS,
        "CAP_BITS": float_bits(shape.cap),
    }
    for kv, atoms in zip(KV, (shape.key_atoms, shape.value_atoms), strict=True):
        address = layout.address(kv)
        offset, stride = address.scale_offset, address.scale_stride
        out |= {
            f"{kv.upper()}_SPARSITY": address.sparsity,
            f"{kv.upper()}_ATOMS": atoms,
            f"{kv.upper()}_OFFSET": offset,
            f"{kv.upper()}_STRIDE": stride,
            f"{kv.upper()}_ENTRIES": address.index_offset - offset,
            f"{kv.upper()}_ALIGN": gcd(page_alignment, offset, stride, layout.head_bytes, 16),
        }
    return out


def scratch_bytes(layout: CodeLayout, num_heads: int, num_tokens: int, max_tokens: int) -> int:
    """Most scratch that a step of that many tokens takes, whatever its dictionaries; contexts reach `max_tokens`."""
    shape = shape_for(layout, num_heads, MAX_ATOMS, MAX_ATOMS, max_tokens, NO_LIMIT_BYTES)
    if shape is None:
        return 0
    return min(num_tokens * shape.token_bytes(), max(LOOKUP_SCRATCH_BYTES, shape.token_bytes()))
