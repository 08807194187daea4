"""A layer's pages, layers that one launch codes, and where requests' tokens live in the pages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from torch import Tensor, int64, tensor, uint8

from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.layout import KV, WORD_BYTES, CodeLayout


@dataclass(frozen=True)
class LayerCache:
    """One layer's pages of both kinds and what decodes them.

    Attributes:
        code_pages: uint8 [num_pages, at least page_bytes], stride(1) is 1, pages start at multiples of 4 bytes.
        tail_pages: model dtype [num_pages, Hk, R, 2, D], contiguous within a page, stride(0) is free; may share
            storage with code_pages. K is at index 0 of the fourth axis, V at 1.
        key, value: the codebooks.
        layout: sizes and offsets of both.
        group: G, query heads per KV head, for which the entries of records are ordered; others read them as well, but
            not as fast.

    Raises:
        ValueError: pages that are not as the layout says.
    """

    code_pages: Tensor
    tail_pages: Tensor
    key: Codebook
    value: Codebook
    layout: CodeLayout
    group: int = 4

    def __post_init__(self) -> None:
        layout, codes, tail = self.layout, self.code_pages, self.tail_pages
        if codes.dtype != uint8 or codes.ndim != 2 or codes.shape[1] < layout.page_bytes or codes.stride(1) != 1:
            raise ValueError(
                f"code_pages are {codes.dtype} {list(codes.shape)} with strides {codes.stride()}; allowed: uint8 "
                f"[num_pages, {layout.page_bytes} or more] with dense rows; view the cache as bytes"
            )
        if codes.data_ptr() % WORD_BYTES or codes.stride(0) % WORD_BYTES:
            raise ValueError(
                f"code_pages start at address {codes.data_ptr()}, {codes.stride(0)} bytes apart; allowed: multiples of "
                f"{WORD_BYTES} for both, in which kernels load; pad the pages"
            )
        R, D = layout.tail_tokens, layout.head_dim
        strides = (R * 2 * D, 2 * D, D, 1)
        # The stride of an axis of length 1 says nothing, and views give it any value.
        axes = zip(tail.shape[1:], tail.stride()[1:], strides, strict=False)
        dense = all(size == 1 or stride == wanted for size, stride, wanted in axes)
        if tail.shape[1:] != (layout.num_kv_heads, R, 2, D) or not dense:
            raise ValueError(
                f"tail_pages are {list(tail.shape)} with strides {tail.stride()}; allowed: [num_pages, "
                f"{layout.num_kv_heads}, {R}, 2, {D}], contiguous within a page; view the cache by its layout"
            )
        if tail.element_size() != layout.element_bytes:
            raise ValueError(
                f"tail_pages are {tail.dtype}; allowed: dtypes of {layout.element_bytes} bytes; "
                "make the layout with the model's element_bytes"
            )

    def codebook(self, kv: str) -> Codebook:
        """The codebook of "key" or "value"."""
        return self.key if kv == "key" else self.value

    def head(self, index: int) -> "LayerCache":
        """One KV head's share of the same pages: as those of a layer that has no other."""
        layout = replace(self.layout, num_kv_heads=1, raw_tokens=self.layout.tail_tokens)
        codes = self.code_pages[:, index * layout.head_bytes : (index + 1) * layout.head_bytes]
        tail = self.tail_pages[:, index : index + 1]
        return LayerCache(codes, tail, self.key.head(index), self.value.head(index), layout, self.group)


BOOK_FIELDS = ("atoms", "levels", "mean", "stretch", "stream_atoms", "integers", "lengths")


@dataclass(frozen=True)
class LayerStack:
    """Layers that one launch codes, alike in all but where their tensors are. Make it with `of`.

    Attributes:
        caches: of the layers, at least one.
        addresses: int64 [L, 16] on their device, of each layer's tensors in the order of COLUMNS; 0 of what is None.
    """

    caches: tuple[LayerCache, ...]
    addresses: Tensor

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "tail_pages",
        "code_pages",
        *(f"{kv}.{field}" for kv in KV for field in BOOK_FIELDS),
    )

    @classmethod
    def of(cls, caches: Sequence[LayerCache]) -> "LayerStack | None":
        """Stack layers that are alike; None if they are not, or lie where kernels cannot load 16 bytes at once."""
        if len({_kind(cache) for cache in caches}) != 1:
            return None
        tensors = [[_at(cache, column) for column in cls.COLUMNS] for cache in caches]
        addresses = [[0 if each is None else each.data_ptr() for each in row] for row in tensors]
        if any(address % 16 for row in addresses for address in row):
            return None
        return cls(tuple(caches), tensor(addresses, dtype=int64, device=caches[0].code_pages.device))

    @classmethod
    def column(cls, name: str) -> int:
        """The column of `addresses` with a tensor's addresses."""
        return cls.COLUMNS.index(name)

    @classmethod
    def macros(cls) -> dict[str, int]:
        """Columns for CUDA C++: COLUMNS, how many, and as TAIL_PAGES_COLUMN, KEY_ATOMS_COLUMN, ... where."""
        names = {f"{name.upper().replace('.', '_')}_COLUMN": at for at, name in enumerate(cls.COLUMNS)}
        return {"COLUMNS": len(cls.COLUMNS)} | names


def _at(cache: LayerCache, column: str) -> Tensor | None:
    kv, _, field = column.rpartition(".")
    return getattr(cache.codebook(kv) if kv else cache, field)


def _kind(cache: LayerCache) -> tuple:
    """What layers of a stack have in common."""
    tensors = [_at(cache, column) for column in LayerStack.COLUMNS]
    strides = [pages.stride(0) for pages in (cache.tail_pages, cache.code_pages)]
    gains = [cache.codebook(kv).gain for kv in KV]
    kinds = [None if each is None else (each.dtype, each.device, each.shape) for each in tensors]
    return cache.layout, cache.group, *strides, *gains, *kinds


@dataclass(frozen=True)
class RequestTables:
    """Where each of B requests' tokens live in this step; rows may be padding.

    Positions below sink_end and from raw_start on are raw; those between are codes. Both are multiples of R.

    Attributes:
        block_table: int32 [B, max_pages]; position p of request b is coded in page block_table[b, p // P].
        tail_block_table: int32 [B, max_tail_pages]; position p is raw in page tail_block_table[b, p // R]. Entries
            outside the raw ranges may be stale.
        sink_end: int32 [B].
        raw_start: int32 [B], at least sink_end.
    """

    block_table: Tensor
    tail_block_table: Tensor
    sink_end: Tensor
    raw_start: Tensor


class DecodePlan(NamedTuple):
    """Of a step in which all requests decode: T tokens of the batch, and M that may be coded, those that are first.

    Attributes:
        token_request: int32 [T], the last request for padding.
        token_seq_len: int32 [T], positions that a token sees; 0 for padding.
        request: int32 [M], of each token to code; of no meaning where the list is not used.
        position: int32 [M], in the request's sequence; -1 where the list is not used.
        destination: int64 [M], page * P + offset; -1 where the list is not used.
    """

    token_request: Tensor
    token_seq_len: Tensor
    request: Tensor
    position: Tensor
    destination: Tensor
