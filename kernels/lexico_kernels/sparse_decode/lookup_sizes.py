"""Sizes of the decode path through tables: what its steps, its compiled kernel and whoever reserves memory ask."""

from dataclasses import dataclass
from functools import cache as once
from math import gcd

import torch

from lexico_kernels.device.launch import TABLE, TABLE_MATMUL, TABLE_SCRATCH_BYTES, TABLE_TAIL, TableLaunch, table_launch
from lexico_kernels.memory.layout import KV, MAX_ATOMS, CodeLayout

MAX_GROUP = 8  # query heads that one pass over the codes can serve
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
        max_parts: of a context.
        head_groups: blocks of query heads for each KV head, each of which goes over the codes once.
    """

    layout: CodeLayout
    num_heads: int
    key_atoms: int
    value_atoms: int
    max_parts: int
    head_groups: int

    @property
    def blocks(self) -> int:
        """Blocks of query heads."""
        return self.layout.num_kv_heads * self.head_groups

    @property
    def group(self) -> int:
        """G, query heads of a block."""
        return self.num_heads // self.blocks

    @property
    def row(self) -> int:
        """G up to a power of two."""
        return power_of_two(self.group)

    @property
    def chunk(self) -> int:
        """Atoms of a program of `multiply_bins`; of the longest context alone, so that batches change no bits."""
        return TABLE_MATMUL.long_chunk if self.max_parts >= TABLE_MATMUL.long_parts else TABLE_MATMUL.chunk

    @property
    def chunks(self) -> int:
        """Shares of the atoms that `multiply_bins` takes apart."""
        return divide_up(self.value_atoms, self.chunk)

    def scratch(self) -> dict[str, tuple[int, torch.dtype]]:
        """Numbers that a token needs of each buffer, and their type."""
        heads = self.blocks * self.row
        return {
            "table": (heads * self.key_atoms, torch.float16),
            "bins": (self.num_heads * self.max_parts * self.value_atoms, torch.float16),
            "stats": (3 * heads * self.max_parts, torch.float32),
            "query_scale": (heads, torch.float32),
            "offset": (heads, torch.float32),
            "coded_lse": (heads, torch.float32),
            "chunk_out": (self.chunks * self.num_heads * self.layout.head_dim, torch.float32),
            "tail_out": (self.num_heads * TABLE_TAIL.parts * self.layout.head_dim, torch.float32),
            "tail_lse": (self.num_heads * TABLE_TAIL.parts, torch.float32),
            "plan": (4, torch.int32),
        }

    def token_bytes(self) -> int:
        """Scratch of one token."""
        return sum(count * dtype.itemsize for count, dtype in self.scratch().values())

    def slice_tokens(self) -> int:
        """Tokens that are done at a time."""
        return max(1, min(TABLE_SCRATCH_BYTES // self.token_bytes(), MAX_GRID_ROWS // self.blocks))


def max_parts(max_tokens: int) -> int:
    """Most parts of a context of at most that many tokens; what `prepare` plans is never more."""
    short = divide_up(min(max_tokens, TABLE.short_tokens), TABLE.short_span)
    return max(1, short, divide_up(max_tokens, TABLE.span))


def shared_bytes(launch: TableLaunch, group: int, key_atoms: int, value_atoms: int) -> int:
    """Dynamic shared memory of a block of `attend_codes`: table or weights, and scores or bins."""
    tokens = divide_up(TABLE.span, launch.threads) * launch.threads
    table = divide_up(max(key_atoms, tokens) * power_of_two(group) * 2, 16) * 16
    return table + group * max(value_atoms, tokens) * 4


def head_groups(group: int, key_atoms: int, value_atoms: int, limit_bytes: int) -> int:
    """Into how many blocks a KV head's query heads are cut: as few as go through one pass and fit shared memory; 0
    if none do."""
    for blocks in range(1, group + 1):
        if group % blocks == 0 and group // blocks <= MAX_GROUP:
            launch = table_launch(group // blocks)
            if shared_bytes(launch, group // blocks, key_atoms, value_atoms) + TABLE.static_bytes <= limit_bytes:
                return blocks
    return 0


@once
def shape_for(
    layout: CodeLayout, num_heads: int, key_atoms: int, value_atoms: int, max_tokens: int, limit_bytes: int
) -> Shape | None:
    """The shape for contexts of at most `max_tokens`, or None if the query heads do not fit shared memory."""
    blocks = head_groups(num_heads // layout.num_kv_heads, key_atoms, value_atoms, limit_bytes)
    return Shape(layout, num_heads, key_atoms, value_atoms, max_parts(max_tokens), blocks) if blocks else None


def constants(shape: Shape, launch: TableLaunch, page_alignment: int, limit_bytes: int) -> dict[str, int]:
    """The macros of `attend_codes`."""
    layout, group = shape.layout, shape.group
    shared = shared_bytes(launch, group, shape.key_atoms, shape.value_atoms) + TABLE.static_bytes
    out = {
        "GROUP": group,
        "ROW": shape.row,
        "ROTATE": launch.rotate if power_of_two(group) == group else 0,
        "THREADS": launch.threads,
        "ROUNDS": divide_up(TABLE.span, launch.threads),
        "MIN_BLOCKS": max(1, min(limit_bytes // shared, launch.max_blocks)),
        "LOOKUP": launch.lookup,
        "PAGE_TOKENS": layout.block_tokens,
        "HEAD_BYTES": layout.head_bytes,
        "HEAD_GROUPS": shape.head_groups,
    }
    for part, atoms in zip(KV, (shape.key_atoms, shape.value_atoms), strict=True):
        offset, stride = layout.kv_offset_bytes(part), layout.vector_bytes(part)
        out |= {
            f"{part.upper()}_SPARSITY": layout.sparsity(part),
            f"{part.upper()}_ATOMS": atoms,
            f"{part.upper()}_OFFSET": offset,
            f"{part.upper()}_ALIGN": gcd(page_alignment, offset, stride, layout.head_bytes, 16),
        }
    return out


def scratch_bytes(layout: CodeLayout, num_heads: int, num_tokens: int, max_tokens: int) -> int:
    """Most scratch that a step of that many tokens takes, whatever its dictionaries; contexts reach `max_tokens`."""
    shape = shape_for(layout, num_heads, MAX_ATOMS, MAX_ATOMS, max_tokens, NO_LIMIT_BYTES)
    if shape is None:
        return 0
    return min(num_tokens * shape.token_bytes(), max(TABLE_SCRATCH_BYTES, shape.token_bytes()))
