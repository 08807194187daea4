"""The pages of full-precision tokens: the newest ones and a sequence's first ones, owned by vLLM's scheduler.

A request's tail is a table with one entry for each `block_size` tokens of its sequence. Entries of the first
`sink_blocks` pages stay for its life; of the others only those that reach into the newest `retained_tokens` hold a
page, the rest are vLLM's null block. Readers must look at those two ranges only: entries between them may be stale.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_lexico import compat
from vllm_lexico.serve import tail_hits
from vllm_lexico.serve.wiring.pages import check_pages

if TYPE_CHECKING:
    from lexico_kernels import CodeLayout

    from vllm_lexico.serve.setup import LexicoSetup

TAIL_SUFFIX = ".lexico_tail"  # of the name of a layer's shadow


@dataclass(frozen=True, kw_only=True)
class LexicoTailSpec(SlidingWindowSpec):
    """Cache spec of a layer's tail; `sliding_window` is the window plus the one token being computed.

    Attributes:
        sink_blocks: pages at the start of a sequence that stay for its life.
        hit_margin_tokens: 0, or the tokens of a code page where a prefix-cache hit needs its whole window. Such a hit
            ends at the last whole code page, so its window lies up to this many tokens below the newest one, and
            pages stay for as long; where answers are the same cold and after a hit, the window of a step's first
            token lies as far below it. vLLM's own `extra_retained_tokens` cannot say so: it sets that of every
            sliding-window spec when it plans the cache.
        concurrent_batches: scheduling steps that may be under way at once (2 with asynchronous scheduling).
        coded_later: steps with prefill may leave their tokens to be coded by the next step.
        lookahead_tokens: beyond a step's last one, for which vLLM takes pages where a model drafts.
    """

    sink_blocks: int
    hit_margin_tokens: int
    concurrent_batches: int
    coded_later: bool = False
    lookahead_tokens: int = 0

    @property
    def window_tokens(self) -> int:
        """Computed tokens below a step's first position that are read in full precision."""
        return self.sliding_window - 1

    @property
    def retained_tokens(self) -> int:
        """Computed tokens below a step's first position that keep their pages."""
        return self.window_tokens + self.extra_retained_tokens + self.hit_margin_tokens

    @property
    def num_retained_tokens(self) -> int:
        """0 keeps vLLM's worker from nulling what lies below the window, the sink pages among it."""
        return 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most pages that a request ever holds at once.

        Every step under way reads the window before its chunk and leaves one after it, so `concurrent_batches` + 1
        windows; a chunk's tokens between them take no page. Short chunks and short sequences hold less.

        vLLM asks this where it makes a manager, whichever it chooses; so that is tested here.
        """
        check_pages(LexicoTailManager, LexicoTailSpec)
        windows = (self.concurrent_batches + 1) * (cdiv(self.retained_tokens, self.block_size) + 1)
        windows += cdiv(self.lookahead_tokens, self.block_size)
        in_flight = cdiv(self.retained_tokens + max_in_flight_tokens + self.lookahead_tokens, self.block_size) + 1
        return min(self.sink_blocks + min(windows, in_flight), cdiv(max_model_len, self.block_size))


def tail_spec(setup: LexicoSetup, layout: CodeLayout, dtype: torch.dtype) -> LexicoTailSpec:
    """The tail of a layer whose codes have this layout; its pages have exactly the bytes of a code page."""
    return LexicoTailSpec(
        block_size=layout.tail_tokens,
        num_kv_heads=layout.num_kv_heads,
        head_size=layout.head_dim,
        dtype=dtype,
        page_size_padded=layout.page_bytes if layout.page_bytes > layout.tail_page_bytes else None,
        sliding_window=setup.window_tokens + 1,
        sink_blocks=setup.sink_blocks(layout),
        hit_margin_tokens=layout.block_tokens if setup.config.prefix_hits != "codes" else 0,
        concurrent_batches=setup.concurrent_batches,
        coded_later=setup.later_tokens > 0,
        lookahead_tokens=setup.lookahead_tokens,
    )


class LexicoTailManager(SlidingWindowManager):
    """Gives out, caches and takes back the tail pages of requests."""

    kv_cache_spec: LexicoTailSpec

    def __init__(self, kv_cache_spec: LexicoTailSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._null_below: dict[str, int] = {}  # request: all pages from the sinks up to here are null already
        compat.publish_events_of_whole_prefixes(self)

    def new_step_starts(self) -> None:
        """What earlier steps completed is coded before this one runs."""
        tail_hits.completing(self.block_pool).clear()

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Make a request's full pages known, and remember which blocks of codes the step completes too late for itself.

        vLLM lets other requests hit a block from when the step that fills it is scheduled, so in that very step. In a
        step of decode its codes are written when all layers have read theirs (`layer_stack.py`); such a block has its
        first tokens from an earlier step. Where coding waits (`later_coding.py`), no block is coded in that step.
        """
        known_tokens = self.num_cached_block.get(request.request_id, 0) * self.block_size
        super().cache_blocks(request, num_tokens, *args, **kwargs)
        block_tokens, pool = self.cache_hit_alignment_tokens, self.block_pool
        end = min(num_tokens, len(request.block_hashes) * pool.hash_block_size) // block_tokens * block_tokens
        first = known_tokens // block_tokens * block_tokens
        if not self.kv_cache_spec.coded_later:
            first = max(first, end - block_tokens)
            if first >= request.num_computed_tokens:
                return
        if known_tokens < end:
            hashes = tail_hits.page_hashes(request.block_hashes, pool, self.block_size, block_tokens)
            ends = range(first + block_tokens, end + 1, block_tokens)
            tail_hits.completing(pool).update(hashes[each // self.block_size - 1] for each in ends)

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Tokens below the window, and below what is kept for hits."""
        return max(num_computed_tokens - self.kv_cache_spec.retained_tokens, 0)

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
        """Free pages that the next step takes, or with `apply_admission_cap` that the request may yet take.

        `total_computed_tokens` has those that a connector brings too; of their pages only sinks are taken.
        """
        num_pages, num_known = cdiv(num_tokens, self.block_size), len(new_computed_blocks)
        num_known += len(self.req_to_blocks.get(request_id, ()))
        evictable = self._get_num_evictable_blocks(new_computed_blocks)
        if apply_admission_cap:
            fresh = max(num_pages - num_known, 0) + evictable
            assert self.max_admission_blocks_per_request is not None
            return min(fresh, self.max_admission_blocks_per_request - self._num_kept(request_id, new_computed_blocks))
        brought = max(num_known, total_computed_tokens // self.block_size)
        sinks = range(num_known, min(brought, self.kv_cache_spec.sink_blocks))
        fresh = sum(self._takes_page(page, num_tokens_main_model) for page in range(brought, num_pages))
        return len(sinks) + fresh + evictable

    def _num_kept(self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock]) -> int:
        """Pages that a request holds and will keep or give back to the pool, so that they cost it no free page.

        A resumed request, whose input comes in pieces, holds pages already. What others hold too is not free once
        the request's window has left it, so of that only the sinks count.
        """
        held, sinks = self.req_to_blocks.get(request_id, ()), self.kv_cache_spec.sink_blocks
        own = sum(not block.is_null and (page < sinks or block.ref_cnt == 1) for page, block in enumerate(held))
        return own + sum(block.ref_cnt > 0 and not block.is_null for block in new_computed_blocks[:sinks])

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take over the pages of a prefix-cache hit; those that it does not need are null already."""
        request_blocks = self.req_to_blocks[request_id]
        assert not request_blocks
        self.block_pool.touch([block for block in new_computed_blocks if not block.is_null])
        request_blocks.extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(request_blocks)

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        """Extend the table to what a connector brings: whole blocks of codes with their sinks, and no window."""
        end = num_local_computed_tokens + num_external_computed_tokens
        assert end % self.cache_hit_alignment_tokens == 0, "a connector brings part of a block of codes"
        pages = range(len(self.req_to_blocks[request_id]), end // self.block_size)
        self._extend(request_id, [page < self.kv_cache_spec.sink_blocks for page in pages], record_for_zeroing)

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Extend the table to `num_tokens`; tokens that are outside the window when the step ends get no page."""
        pages = range(len(self.req_to_blocks[request_id]), cdiv(num_tokens, self.block_size))
        return self._extend(request_id, [self._takes_page(page, num_tokens_main_model) for page in pages])

    def _extend(self, request_id: str, takes: list[bool], record_for_zeroing: bool = True) -> list[KVCacheBlock]:
        """Put a page, or the null block, at the end of a request's table for each place."""
        request_blocks = self.req_to_blocks[request_id]
        fresh = self.block_pool.get_new_blocks(sum(takes))
        if self._record_new_block_ids and record_for_zeroing:
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
        """The longest hit that has its sinks and, where the spec asks for it, its window: see `tail_hits.py`.

        It ends before a block that the step which is being scheduled completes: see `cache_blocks`.
        """
        if drop_eagle_block:  # asked for a page more than the hit of codes, which has dropped its last block already
            max_length -= kv_cache_spec.block_size
        hit = tail_hits.longest_hit(
            kv_cache_spec,
            tail_hits.page_hashes(block_hashes, block_pool, kv_cache_spec.block_size, alignment_tokens),
            functools.partial(block_pool.get_cached_block, kv_cache_group_ids=kv_cache_group_ids),
            max_length,
            alignment_tokens,
            tail_hits.completing(block_pool),
            tail_hits.tokens_before(block_pool),
        )
        nulls = [block_pool.null_block] * len(kv_cache_group_ids)
        columns = [blocks or nulls for blocks in hit.pages]
        return tuple([column[group] for column in columns] for group in range(len(nulls))), hit.length

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
