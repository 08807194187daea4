"""The scheduler of vLLM's OffloadingConnector: of the tail it stores and loads the sinks, with the first codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_offload.base import GPULoadStoreSpec, LookupResult

from vllm_lexico.serve.tail_pages import LexicoTailSpec

_NO_PAGE = KVCacheBlock(0)
_NO_PAGE.is_null = True


class SinksWithCodes(OffloadingConnectorScheduler):
    """As vLLM's, with a rule of its own for the group of tails.

    vLLM takes the tail for a sliding window: it would ask for a window at each hit's end and leave out the sinks.
    """

    def become(self) -> None:
        """Take over what vLLM's own scheduler has set up; called once, in the place of `__init__`."""
        configs = self.config.kv_group_configs
        self._tail = next(i for i, one in enumerate(configs) if isinstance(one.kv_cache_spec, LexicoTailSpec))
        assert self.config.blocks_per_chunk == 1 and self._tail == len(configs) - 1, "the tail is the last group"
        self._sink_blocks = configs[self._tail].kv_cache_spec.sink_blocks
        self._block_tokens = max(one.tokens_per_block for one in configs)
        self._lookup_groups: tuple[int, ...] = tuple(g for g in self._full_attention_groups if g != self._tail)

    def _sink_keys(self, req_status: Any, computed_tokens: int) -> list[Any]:
        """Keys of the sinks that a request lacks: all where it starts, none where it has them from a local hit."""
        keys: list[Any] = req_status.group_states[self._tail].offload_keys[: self._sink_blocks]
        return [] if computed_tokens else keys

    def _lookup(self, req_status: Any, *args: Any, **kwargs: Any) -> int | None:
        """Tokens of whole blocks that can be loaded: none where their sinks cannot, None where it is not known yet."""
        found = super()._lookup(req_status, *args, **kwargs)
        if not found:
            return found
        found -= (req_status.num_locally_computed_tokens + found) % self._block_tokens
        keys = self._sink_keys(req_status, req_status.num_locally_computed_tokens)
        results = [self.manager.lookup(key, req_status.req_context) for key in keys]
        if LookupResult.MISS in results:
            return 0
        loading = self._chunks_being_loaded or ()
        ready = all(result is LookupResult.HIT for result in results) and not any(key in loading for key in keys)
        return found if ready else None

    def update_state_after_alloc(self, request: Any, blocks: KVCacheBlocks, num_external_tokens: int) -> None:
        """Make a job that loads the codes, as vLLM does for a group without a window, and give it the sinks."""
        columns = list(blocks.blocks)
        tail = columns[self._tail]
        self._current_batch_allocated_block_ids.update(block.block_id for block in tail if not block.is_null)
        columns[self._tail] = [_NO_PAGE] * len(tail)
        status = self._req_status[request.request_id]
        keys = self._sink_keys(status, status.num_locally_computed_tokens) if num_external_tokens else []
        job_id, manager = self._job_counter, self.__dict__["manager"]
        self.__dict__["manager"] = _Together(manager, keys)
        try:
            super().update_state_after_alloc(request, KVCacheBlocks(tuple(columns)), num_external_tokens)
        finally:
            self.__dict__["manager"] = manager
        if not keys:
            return
        job = self._current_batch_load_jobs[job_id]
        self._current_batch_load_jobs[job_id] = _with_sinks(job, self._tail, [b.block_id for b in tail[: len(keys)]])
        self._jobs[job_id].keys.update(keys)
        if self._chunks_being_loaded is not None and not getattr(job, "sync", False):
            self._chunks_being_loaded.update(keys)

    def _reachable_store_block_mask(
        self, group_config: Any, start_chunk_idx: int, end_chunk_idx: int, *args: Any, **kwargs: Any
    ) -> list[bool] | None:
        """What is worth storing: all codes, and of the tail the sinks."""
        if not isinstance(group_config.kv_cache_spec, LexicoTailSpec):
            mask: list[bool] | None = super()._reachable_store_block_mask(
                group_config, start_chunk_idx, end_chunk_idx, *args, **kwargs
            )
            return mask
        return [page < self._sink_blocks for page in range(start_chunk_idx, end_chunk_idx)]


class _Together:
    """A manager that loads some keys after those that it is asked for: those of the last group."""

    def __init__(self, manager: Any, keys: Sequence[Any]) -> None:
        self._manager, self._keys = manager, keys

    def prepare_load(self, keys: Sequence[Any], req_context: Any) -> Any:
        return self._manager.prepare_load([*keys, *self._keys], req_context)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)


def _with_sinks(job: Any, tail: int, pages: list[int]) -> Any:
    """A load job whose blocks of the tail, the last group, are these pages."""
    to = job.dst_spec
    sizes, indices = list(to.group_sizes), list(to.block_indices)
    assert tail == len(sizes) - 1 and sizes[tail] == 0 and 0 not in pages, "a sink has no page to be loaded to"
    sizes[tail], indices[tail] = len(pages), 0
    spec = GPULoadStoreSpec([*to.block_ids.tolist(), *pages], group_sizes=sizes, block_indices=indices)
    return dataclasses.replace(job, dst_spec=spec)
