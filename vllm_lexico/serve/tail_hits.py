"""The prefix-cache hits that a request may take: with sinks, of whole code pages, and of codes that are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes

if TYPE_CHECKING:
    from vllm_lexico.serve.tail_pages import LexicoTailSpec

# Hashes of the prefixes that end with a block whose codes the step that is being scheduled cannot read yet, by pool:
# vLLM asks for hits on the manager's class, so they cannot be a manager's own.
_completing: WeakKeyDictionary[BlockPool, set[Any]] = WeakKeyDictionary()


def completing(pool: BlockPool) -> set[Any]:
    """Hashes of prefixes in `pool` whose last block the step that is being scheduled completes too late for itself."""
    return _completing.setdefault(pool, set())


# Tokens before those whose hashes are looked for, by pool: a connector may ask for what follows a local hit.
_looking_from: WeakKeyDictionary[BlockPool, int] = WeakKeyDictionary()


@contextmanager
def looking_from(pool: BlockPool, num_tokens: int) -> Iterator[None]:
    """Meanwhile hits in `pool` are of a prompt's hashes from this token on, so that its sinks are elsewhere."""
    _looking_from[pool] = num_tokens
    try:
        yield
    finally:
        del _looking_from[pool]


def tokens_before(pool: BlockPool) -> int:
    """Tokens of a prompt before those whose hashes are being looked for."""
    return _looking_from.get(pool, 0)


def page_hashes(hashes: BlockHashList, pool: BlockPool, page_tokens: int, alignment_tokens: int) -> BlockHashList:
    """The hash of the prefix that ends with each page.

    Args:
        hashes: a request's hashes, one per `pool.hash_block_size` tokens.
        pool: the pool of the pages.
        page_tokens: tokens per page.
        alignment_tokens: what lengths of hits are multiples of.
    """
    return resolve_block_hashes(hashes, pool.hash_block_size, page_tokens, alignment_tokens=alignment_tokens)


class Hit(NamedTuple):
    """A hit of `length` tokens: for each page of the tail its blocks in all groups, or None where it is left out."""

    pages: list[Sequence[KVCacheBlock] | None]
    length: int


def longest_hit(
    spec: LexicoTailSpec,
    hashes: BlockHashList,
    cached: Callable[[Any], Sequence[KVCacheBlock] | None],
    max_length: int,
    alignment_tokens: int,
    unwritten: set[Any],
    tokens_before: int = 0,
) -> Hit:
    """Find the longest hit that has its sinks and, where the spec asks for it, the window before it.

    Window pages that are not cached are left out: what they held is read from codes. Those that are there are an
    unbroken run up to the hit's end, so that a reader needs one position to tell codes from pages.

    Args:
        spec: the tail's cache spec.
        hashes: from `page_hashes`.
        cached: the blocks, one per group, of the page with a hash, or None.
        max_length: tokens that a hit may have at most.
        alignment_tokens: what a hit's length is a multiple of: tokens of a code page.
        unwritten: hashes that no hit may end with, from `completing`.
        tokens_before: tokens of the prompt, with sinks among them, that come before the first hash.
    """
    size = spec.block_size
    length = max_length - max_length % alignment_tokens
    while length > 0 and hashes[length // size - 1] in unwritten:
        length -= alignment_tokens
    while length > 0:
        pages: list[Sequence[KVCacheBlock] | None] = [None] * (length // size)
        sinks = range(min(max(spec.sink_blocks - tokens_before // size, 0), len(pages)))
        for page in sinks:
            pages[page] = cached(hashes[page])
        if not all(pages[page] for page in sinks):
            break
        window = range(max(length - spec.window_tokens, 0) // size, len(pages))
        for page in reversed(window):
            pages[page] = cached(hashes[page])
            if not pages[page]:
                break
        if not spec.hit_margin_tokens or all(pages[page] for page in window):
            return Hit(pages, length)
        length -= alignment_tokens
    return Hit([], 0)
