"""Arguments of the kernels in Triton as NamedTuples, so that what belongs together is passed together.

Triton takes a NamedTuple apart when it compiles: each tensor and integer in it is specialised as if it were an argument
of its own (pointers aligned to 16 bytes, integers divisible by 16). `Sizes` holds compile-time constants only and is
passed as one `tl.constexpr`. Two rules of Triton 3.6: a member of `Sizes` gets a name of its own before use, as in
`D: tl.constexpr = SIZES.D`; and a tuple within a tuple holds tensors only, since an integer 1 there is lost.

Keys and values come as pairs in the order of `layout.KV`; `tl.static_range(2)` goes over them, and a function that
takes `KV: tl.constexpr` finds its own as `books[KV]` and `SIZES.kv[KV]`.
"""

from functools import cache
from typing import NamedTuple

from torch import Tensor

from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.layout import KV, CodeLayout, RecordAddress
from lexico_kernels.memory.pages import LayerCache, RequestTables


class Rows(NamedTuple):
    """Vectors of tokens, [T, H, D] with dense last axis: queries, fresh keys or values, or results."""

    data: Tensor
    token_stride: int  # numbers from one token to the next
    head_stride: int

    @classmethod
    def of(cls, rows: Tensor) -> "Rows":
        """The argument for a tensor [T, H, D]."""
        return cls(rows, rows.stride(0), rows.stride(1))


class Pages(NamedTuple):
    """Code pages as bytes, or tail pages in the model's dtype."""

    data: Tensor
    stride: int  # numbers from one page to the next

    @classmethod
    def codes(cls, cache: LayerCache) -> "Pages":
        """A layer's code pages."""
        return cls(cache.code_pages, cache.code_pages.stride(0))

    @classmethod
    def tail(cls, cache: LayerCache) -> "Pages":
        """A layer's tail pages."""
        return cls(cache.tail_pages, cache.tail_pages.stride(0))


class Tables(NamedTuple):
    """`RequestTables` as kernels take them."""

    block_table: Tensor
    block_table_stride: int
    tail_block_table: Tensor
    tail_block_table_stride: int
    sink_end: Tensor
    raw_start: Tensor

    @classmethod
    def of(cls, tables: RequestTables) -> "Tables":
        """The argument for a step's tables."""
        blocks, tails = tables.block_table, tables.tail_block_table
        return cls(blocks, blocks.stride(0), tails, tails.stride(0), tables.sink_end, tables.raw_start)


class Book(NamedTuple):
    """What codes and decodes keys or values of a layer, see `Codebook`. Its sizes are in `Sizes.kv`."""

    atoms: Tensor
    levels: Tensor
    mean: Tensor
    stretch: Tensor

    @classmethod
    def pair(cls, cache: LayerCache) -> tuple["Book", "Book"]:
        """Of a layer's keys and values."""
        return cls(*cache.key.tensors), cls(*cache.value.tensors)


class KvSizes(NamedTuple):
    """Compile-time constants of keys or values."""

    ADDRESS: RecordAddress | None  # None for kernels that read no records
    N: int  # atoms
    HEAD_STRIDE: int  # numbers from one head's atoms to the next head's, 0 where heads share them


class Sizes(NamedTuple):
    """Compile-time constants of a layer's cache; letters as in docs/design/memory.md."""

    kv: tuple[KvSizes, KvSizes]
    HEAD_BYTES: int  # of one head in a code page; 0 for kernels that read no records
    CODEC: str
    P: int
    R: int
    D: int
    D_PAD: int  # D up to a power of two

    @classmethod
    def of(cls, cache: LayerCache, *, records: bool = True) -> "Sizes":
        """Those of a layer's cache; made once per layout and codebooks' shape.

        records: whether the kernel reads or writes them. One that does not is then compiled once for all sparsities.
        """
        return _sizes(cache.layout, records, *_book_sizes(cache.key), *_book_sizes(cache.value))


def _book_sizes(book: Codebook) -> tuple[int, int]:
    return book.num_atoms, book.head_stride


@cache
def _sizes(layout: CodeLayout, records: bool, *sizes: int) -> Sizes:
    pairs = zip(KV, (sizes[:2], sizes[2:]), strict=True)
    key, value = (KvSizes(layout.address(kv) if records else None, *of_book) for kv, of_book in pairs)
    head_bytes, padded = layout.head_bytes if records else 0, 1 << (layout.head_dim - 1).bit_length()
    return Sizes(
        (key, value), head_bytes, layout.codec, layout.block_tokens, layout.tail_tokens, layout.head_dim, padded
    )
