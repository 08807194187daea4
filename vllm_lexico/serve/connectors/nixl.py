"""vLLM's NixlConnector: prefill in one engine, decode in another, which agree on their dictionary before a block moves.

The engine that decodes takes whole blocks of codes and the sinks, and computes what is left of the prompt itself.
"""

from __future__ import annotations

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlPullConnector
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_scheduler import NixlPullConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from vllm_lexico.serve.tail_pages import LexicoTailSpec


class WholeBlocksConnector(NixlPullConnector):
    """As vLLM's; asks for local hits that have their sinks."""

    @property
    def supports_divergent_local_hybrid_hits(self) -> bool:
        """A hit whose sinks are gone is none, whatever could be fetched."""
        return False

    def become(self) -> None:
        """Nothing to take over."""


class WholeBlocks(NixlPullConnectorScheduler):
    """As vLLM's, which sends a group's window and takes all that was sent, to the last token."""

    def become(self) -> None:
        """Take over what vLLM's own scheduler has set up; called once, in the place of `__init__`."""
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        self._tail = next(i for i, spec in enumerate(specs) if isinstance(spec, LexicoTailSpec))
        self._codes, self._sink_blocks = 1 - self._tail, specs[self._tail].sink_blocks
        self._block_tokens = specs[self._codes].block_size
        self._reading: tuple[list[int], ...] | None = None

    def _columns(self, codes: list[int], sinks: list[int]) -> tuple[list[int], ...]:
        """Blocks by group."""
        return (codes, sinks) if self._tail else (sinks, codes)

    def request_finished(self, request: Any, block_ids: Any) -> tuple[bool, dict[str, Any] | None]:
        """Offer the full blocks of codes, which are coded to their end, and the sinks."""
        delay, params = super().request_finished(request, block_ids)
        if params and params.get("remote_block_ids"):
            num_full = request.num_computed_tokens // self._block_tokens
            codes, sinks = block_ids[self._codes][:num_full], block_ids[self._tail][: self._sink_blocks]
            params["remote_block_ids"] = self._columns(codes, sinks)
        return delay, params

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Take whole blocks, and leave at least a token of the prompt to compute."""
        count, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        if not count:
            return count, is_async
        offered = len(request.kv_transfer_params["remote_block_ids"][self._codes])
        blocks = min(offered, (min(num_computed_tokens + count, request.num_tokens) - 1) // self._block_tokens)
        count = max(blocks * self._block_tokens - num_computed_tokens, 0)
        return count, count > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Name the blocks that are read, here and there: as many codes on both sides, and the sinks with the first."""
        params = request.kv_transfer_params or {}
        if params.get("do_remote_prefill") and params.get("remote_block_ids") and num_external_tokens:
            codes, sinks = (params["remote_block_ids"][group] for group in (self._codes, self._tail))
            fresh = blocks.get_unhashed_block_ids_all_groups()
            count = num_external_tokens // self._block_tokens
            starts = len(blocks.blocks[self._codes]) - len(fresh[self._codes])
            here = self._columns(fresh[self._codes][:count], [] if starts else fresh[self._tail][: len(sinks)])
            there = self._columns(codes[starts : starts + count], [] if starts else sinks)
            assert list(map(len, here)) == list(map(len, there)), "as many blocks are read as there are places for"
            params["remote_block_ids"] = there
            self._reading = here
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def get_exchange_clipped_blocks(self, block_ids: Any, clip_ssm: bool = True) -> Any:
        """What `update_state_after_alloc` says where blocks are read; whole lists elsewhere, which are cut then."""
        reading, self._reading = self._reading, None
        return block_ids if reading is None else reading


class AgreeingWorker(NixlPullConnectorWorker):
    """As vLLM's, with what the codes mean added to the hash that both sides compare."""

    def become(self, identity: str) -> None:
        """Take over what vLLM's own worker has set up.

        Args:
            identity: of this engine, see `identity.py`.
        """
        self._identity = identity

    @property
    def compat_hash(self) -> str | None:
        """What the other side's has to be equal to; a mismatch is said with both."""
        given = self.__dict__.get("compat_hash")
        return None if given is None else f"{given} ({self._identity})"

    @compat_hash.setter
    def compat_hash(self, given: str | None) -> None:
        self.__dict__["compat_hash"] = given
