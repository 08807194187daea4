"""The pages of full-precision tokens: the newest ones and a sequence's first ones, owned by vLLM's scheduler.

A request's tail is a table with one entry for each `block_size` tokens of its sequence. Entries of the first
`sink_blocks` pages stay for its life; of the others only those that reach into the newest `retained_tokens` hold a
page, the rest are vLLM's null block. Readers must look at those two ranges only: entries between them may be stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_lexico import compat

if TYPE_CHECKING:
    from lexico_kernels import CodeLayout

    from vllm_lexico.serve.setup import LexicoSetup


@dataclass(frozen=True, kw_only=True)
class LexicoTailSpec(SlidingWindowSpec):
    """Cache spec of a layer's tail; `sliding_window` is the window plus the one token being computed.

    sink_blocks: pages at the start of a sequence that stay for its life.
    window_hits: accept a prefix-cache hit only where the whole window before it is cached. Hits end at whole code
        pages, so `extra_retained_tokens` then has to be a code page's tokens.
    concurrent_batches: scheduling steps that may be under way at once (2 with asynchronous scheduling).
    """

    sink_blocks: int
    window_hits: bool
    concurrent_batches: int

    @property
    def window_tokens(self) -> int:
        """Computed tokens below a step's first position that are read in full precision."""
        return self.sliding_window - 1

    @property
    def retained_tokens(self) -> int:
        """Computed tokens below a step's first position that keep their pages."""
        return self.window_tokens + self.extra_retained_tokens

    @property
    def num_retained_tokens(self) -> int:
        """0 keeps vLLM's worker from nulling what lies below the window, the sink pages among it."""
        return 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most pages that a request ever holds at once.

        Every step under way reads the window before its chunk and leaves one after it, so `concurrent_batches` + 1
        windows; a chunk's tokens between them take no page. Short chunks and short sequences hold less.
        """
        windows = (self.concurrent_batches + 1) * (cdiv(self.retained_tokens, self.block_size) + 1)
        in_flight = cdiv(self.retained_tokens + max_in_flight_tokens, self.block_size) + 1
        return min(self.sink_blocks + min(windows, in_flight), cdiv(max_model_len, self.block_size))


def tail_spec(setup: LexicoSetup, layout: CodeLayout, dtype: torch.dtype) -> LexicoTailSpec:
    """The tail of a layer whose codes have this layout; its pages have exactly the bytes of a code page."""
    window_hits = setup.config.prefix_hits == "window"
    return LexicoTailSpec(
        block_size=layout.tail_tokens,
        num_kv_heads=layout.num_kv_heads,
        head_size=layout.head_dim,
        dtype=dtype,
        page_size_padded=layout.page_bytes if layout.page_bytes > layout.tail_page_bytes else None,
        sliding_window=setup.window_tokens + 1,
        extra_retained_tokens=layout.block_tokens if window_hits else 0,
        sink_blocks=setup.sink_blocks(layout),
        window_hits=window_hits,
        concurrent_batches=setup.concurrent_batches,
    )


# Hashes of the prefixes that end with a block whose last tokens the step that is being scheduled computes, by pool:
# vLLM asks for hits on the class, so they cannot be a manager's own.
_being_completed: WeakKeyDictionary[BlockPool, set[Any]] = WeakKeyDictionary()


class LexicoTailManager(SlidingWindowManager):
    """Gives out, caches and takes back the tail pages of requests."""

    kv_cache_spec: LexicoTailSpec

    def __init__(self, kv_cache_spec: LexicoTailSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._null_below: dict[str, int] = {}  # request: all pages from the sinks up to here are null already
        self._being_completed = _being_completed.setdefault(self.block_pool, set())

    def new_step_starts(self) -> None:
        """What earlier steps completed is coded before this one runs."""
        self._being_completed.clear()

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Make a request's full pages known, and remember which block of codes the step completes.

        vLLM lets other requests hit a block from when the step that fills it is scheduled, so in that very step. In a
        step of decode its codes are written when all layers have read theirs (`layers.py`); such a block has its first
        tokens from an earlier step.
        """
        known_tokens = self.num_cached_block.get(request.request_id, 0) * self.block_size
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        block_tokens = self.cache_hit_alignment_tokens
        end = num_tokens // block_tokens * block_tokens
        if known_tokens < end and end - block_tokens < request.num_computed_tokens:
            hashes = self._page_hashes(request.block_hashes, self.block_pool, self.block_size, block_tokens)
            self._being_completed.add(hashes[end // self.block_size - 1])

    @classmethod
    def _page_hashes(cls, hashes: BlockHashList, pool: BlockPool, page_tokens: int, alignment_tokens: int) -> Any:
        return resolve_block_hashes(
            hashes,
            pool.hash_block_size,
            page_tokens,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )

    def _takes_page(self, page: int, num_computed_tokens: int) -> bool:
        """Whether a page holds anything worth keeping once `num_computed_tokens` are computed."""
        first_in_window = self.get_num_skipped_tokens(num_computed_tokens) // self.block_size
        return page < self.kv_cache_spec.sink_blocks or page >= first_in_window

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """Free pages that the next step takes, or with `apply_admission_cap` that the whole request will take."""
        num_pages = cdiv(num_tokens, self.block_size)
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            in_use_by_others = sum(block.ref_cnt > 0 and not block.is_null for block in new_computed_blocks)
            return max(min(num_pages, self.max_admission_blocks_per_request) - in_use_by_others, 0)
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks)
        new_pages = sum(self._takes_page(page, num_tokens_main_model) for page in range(held, num_pages))
        return new_pages + self._get_num_evictable_blocks(new_computed_blocks)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take over the pages of a prefix-cache hit; those that it does not need are null already."""
        request_blocks = self.req_to_blocks[request_id]
        assert not request_blocks and not num_external_computed_tokens
        self.block_pool.touch([block for block in new_computed_blocks if not block.is_null])
        request_blocks.extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(request_blocks)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Extend the table to `num_tokens`; tokens that are outside the window when the step ends get no page."""
        request_blocks = self.req_to_blocks[request_id]
        pages = range(len(request_blocks), cdiv(num_tokens, self.block_size))
        takes = [self._takes_page(page, num_tokens_main_model) for page in pages]
        fresh = self.block_pool.get_new_blocks(sum(takes))
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in fresh)
        supply = iter(fresh)
        new_blocks = [next(supply) if take else self._null_block for take in takes]
        request_blocks.extend(new_blocks)
        return new_blocks

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free the pages between the sinks and the window."""
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        first = self._null_below.get(request_id, self.kv_cache_spec.sink_blocks)
        last = min(self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size, len(blocks))
        if last <= first:
            return
        self.block_pool.free_blocks([block for block in reversed(blocks[first:last]) if not block.is_null])
        blocks[first:last] = [self._null_block] * (last - first)
        self._null_below[request_id] = last

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Hand over all of a request's pages."""
        self._null_below.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: LexicoTailSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest hit that has its sinks and, where the spec asks for it, the window before it.

        It ends before a block that the step which is being scheduled completes: see `cache_blocks`.

        Missing window pages are null: what they held is read from the codes. Present ones are an unbroken run up to
        the hit's end, so that a reader needs one position to tell codes from pages.
        """
        spec, size = kv_cache_spec, kv_cache_spec.block_size
        hashes = cls._page_hashes(block_hashes, block_pool, size, alignment_tokens)

        def cached(page: int) -> Sequence[KVCacheBlock] | None:
            return block_pool.get_cached_block(hashes[page], kv_cache_group_ids)

        length = max_length - max_length % alignment_tokens
        if drop_eagle_block:
            length = max(length - alignment_tokens, 0)
        if length > 0 and hashes[length // size - 1] in _being_completed.get(block_pool, ()):
            length -= alignment_tokens
        while length > 0:
            num_pages = length // size
            sinks = range(min(spec.sink_blocks, num_pages))
            window = range(max(length - spec.window_tokens, 0) // size, num_pages)
            found = {page: blocks for page in sinks if (blocks := cached(page))}
            if len(found) < len(sinks):
                return tuple([] for _ in kv_cache_group_ids), 0
            for page in reversed(window):
                if not (blocks := cached(page)):
                    break
                found[page] = blocks
            if not spec.window_hits or all(page in found for page in window):
                nulls = [block_pool.null_block] * len(kv_cache_group_ids)
                columns = [found.get(page, nulls) for page in range(num_pages)]
                return tuple([column[group] for column in columns] for group in range(len(kv_cache_group_ids))), length
            length -= alignment_tokens
        return tuple([] for _ in kv_cache_group_ids), 0

    @classmethod
    def reachable_block_mask(
        cls, start_block: int, end_block: int, *args: Any, kv_cache_spec: LexicoTailSpec, **kwargs: Any
    ) -> list[bool] | None:
        """Pages worth caching: what a sliding window keeps, and always the sinks."""
        mask = super().reachable_block_mask(start_block, end_block, *args, kv_cache_spec=kv_cache_spec, **kwargs)
        if mask is not None:
            for page in range(start_block, min(end_block, kv_cache_spec.sink_blocks)):
                mask[page - start_block] = True
        return mask


compat.ensure_builtin_cache_specs()
KVCacheSpecRegistry.register(LexicoTailSpec, LexicoTailManager, uniform_type_base_spec=LexicoTailSpec)
