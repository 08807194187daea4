"""A layer's pages in parts: KV heads of the same sparsity, each part with pages, codebooks and launches of its own.

Most layers are one part. Where the setting `uneven` gives some of a layer's heads more atoms it has two, which share
the layer's tail pages and its run of bytes in a block, one after the other. A part's heads lie side by side; where they
do not in the model, the layer puts its heads into another order when it has a step's queries, keys and values, and back
when they have attended (`HeadOrder`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lexico_kernels import Codebook, CodeLayout, LayerCache, LayerStack, RequestTables, ops
from torch import Tensor, uint8

from vllm_lexico.serve.wiring import allocation


@dataclass(frozen=True)
class HeadOrder:
    """Heads as parts want them.

    Attributes:
        kv_heads: int64 [Hk], which of the model's heads is where.
        heads: int64 [Hq], the same of query heads.
    """

    kv_heads: Tensor
    heads: Tensor

    def batch(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of a step's [T, heads, D] in this order."""
        key, value = (rows.index_select(1, self.kv_heads) for rows in (key, value))
        return query.index_select(1, self.heads), key, value


@dataclass(frozen=True)
class Part:
    """Heads of a layer that are coded alike.

    Attributes:
        heads: which they are, in the order of the layer's parts.
        cache: their pages and codebooks; tail pages are a view of the layer's.
    """

    heads: slice
    cache: LayerCache

    def of(self, rows: Tensor, group: int = 1) -> Tensor:
        """Its heads of [T, heads, D], where each has `group` of them."""
        return rows[:, self.heads.start * group : self.heads.stop * group]


@dataclass(frozen=True)
class LayerParts:
    """A layer's pages, for the operations of `lexico_kernels.ops`, which are done part by part.

    Tensors that it is given have the heads in the order of the parts.

    Attributes:
        whole: all heads, for what does not ask how they are coded; where sparsities differ, not to be decoded.
        parts: of the layer.
        order: of the heads; None if it is the model's.
        by_head: steps of decode code heads, not layers, together: those of a sparsity in all layers.
    """

    whole: LayerCache
    parts: tuple[Part, ...]
    order: HeadOrder | None = None
    by_head: bool = False

    @classmethod
    def of(cls, cache: LayerCache) -> LayerParts:
        """Of a layer whose heads are all alike."""
        return cls(cache, (Part(slice(0, cache.layout.num_kv_heads), cache),))

    @classmethod
    def cut(
        cls,
        given: Tensor,
        own: Tensor,
        tail: Tensor,
        books: Sequence[tuple[Codebook, Codebook]],
        layout: CodeLayout,
        layouts: Sequence[CodeLayout],
        order: HeadOrder | None,
        group: int,
    ) -> LayerParts:
        """Of a layer of an engine in which sparsities differ.

        Args:
            given: uint8 [pages, bytes of the mean], the layer's code pages as vLLM gives them.
            own: uint8 [pages, bytes of the parts], what they are in truth.
            tail: [pages, Hk, R, 2, D].
            books: of the parts.
            layout: of a layer with the mean sparsity.
            layouts: of the parts, whose heads follow one another.
            order: of the heads.
            group: query heads per KV head.
        """
        parts: list[Part] = []
        head = byte = 0
        for pair, of_part in zip(books, layouts, strict=True):
            heads = slice(head, head + of_part.num_kv_heads)
            codes = own[:, byte : byte + of_part.page_bytes]
            parts.append(Part(heads, LayerCache(codes, tail[:, heads], *pair, of_part, group)))
            head, byte = heads.stop, byte + of_part.page_bytes
        return cls(LayerCache(given, tail, *books[0], layout, group), tuple(parts), order, by_head=True)

    def caches_to_stack(self) -> list[LayerCache]:
        """What `stacked` takes of this layer."""
        if not self.by_head:
            return [self.whole]
        return [part.cache.head(at) for part in self.parts for at in range(part.cache.layout.num_kv_heads)]

    def write_tail(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """`ops.write_tail`, of all heads at once."""
        ops.write_tail(key, value, self.whole, slot_mapping)

    def omp_encode(
        self, key: Tensor, value: Tensor, source: Tensor, destination: Tensor, *, relative_error: float
    ) -> None:
        """`ops.omp_encode`."""
        for part in self.parts:
            batch = part.of(key), part.of(value), part.cache
            ops.omp_encode(*batch, source, destination, relative_error=relative_error)

    def sparse_decode(
        self,
        query: Tensor,
        tables: RequestTables,
        token_request: Tensor,
        token_seq_len: Tensor,
        *,
        scale: float,
        out: Tensor,
        soft_cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> None:
        """`ops.sparse_decode`, without the log-sum-exp."""
        group = query.shape[1] // self.whole.layout.num_kv_heads
        for part in self.parts:
            step = part.of(query, group), part.cache, tables, token_request, token_seq_len
            own = None if sinks is None else part.of(sinks[None], group)[0]
            ops.sparse_decode(*step, scale=scale, soft_cap=soft_cap, sinks=own, out=part.of(out, group))

    def reconstruct(
        self, tables: RequestTables, token_request: Tensor, token_position: Tensor, out_key: Tensor, out_value: Tensor
    ) -> None:
        """`ops.reconstruct`."""
        for part in self.parts:
            ops.reconstruct(part.cache, tables, token_request, token_position, part.of(out_key), part.of(out_value))


def stacked(caches: Sequence[LayerCache]) -> tuple[LayerStack, ...]:
    """Layers, or heads, of each layout in a stack; none where those of one are not alike."""
    by_layout: dict[object, list[LayerCache]] = {}
    for cache in caches:
        by_layout.setdefault(cache.layout, []).append(cache)
    stacks = [stack for alike in by_layout.values() if (stack := LayerStack.of(alike)) is not None]
    return tuple(stacks) if len(stacks) == len(by_layout) else ()


def code_pages(kv_cache: Tensor) -> Tensor:
    """Any block-compact view [pages, ...] of vLLM as bytes [pages, page bytes]."""
    allocation.check_dense(kv_cache)
    num_pages, page_elements = kv_cache.shape[0], kv_cache[0].numel()
    return kv_cache.as_strided((num_pages, page_elements), (kv_cache.stride(0), 1)).view(uint8)


def raw_pages(kv_cache: Tensor, layout: CodeLayout) -> Tensor:
    """The same pages as raw tokens [pages, Hk, R, 2, D]."""
    allocation.check_dense(kv_cache)
    heads, tokens, head_dim = layout.num_kv_heads, layout.tail_tokens, layout.head_dim
    strides = (kv_cache.stride(0), tokens * 2 * head_dim, 2 * head_dim, head_dim, 1)
    return kv_cache.as_strided((kv_cache.shape[0], heads, tokens, 2, head_dim), strides)
