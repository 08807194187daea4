"""The scheduler of vLLM's SimpleCPUOffloadConnector: its pool in CPU memory holds codes and sinks.

It looks for hits with the managers of the GPU's pool, so `LexicoTailManager` refuses those that lack sinks.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.simple_kv_offload.manager import SimpleCPUOffloadScheduler

from vllm_lexico.serve import tail_hits
from vllm_lexico.serve.tail_pages import LexicoTailSpec


class SinksWithCodes(SimpleCPUOffloadScheduler):
    """As vLLM's, but of the tail it stores the sinks alone, and hits that go on from a local one need none."""

    def become(self) -> None:
        """Take over what vLLM's own scheduler has set up; called once, in the place of `__init__`."""
        assert self.cpu_kv_cache_config is not None
        specs = [group.kv_cache_spec for group in self.cpu_kv_cache_config.kv_cache_groups]
        self._tail = next(i for i, spec in enumerate(specs) if isinstance(spec, LexicoTailSpec))
        self._sink_blocks = specs[self._tail].sink_blocks

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> Any:
        """Look for what follows the tokens that are computed."""
        with tail_hits.looking_from(self.cpu_block_pool, num_computed_tokens):
            return super().get_num_new_matched_tokens(request, num_computed_tokens)

    def _select_eager_blocks_to_store(self, state: Any, block_ids_by_group: Any) -> Any:
        columns = list(block_ids_by_group)
        columns[self._tail] = columns[self._tail][: self._sink_blocks]
        return super()._select_eager_blocks_to_store(state, tuple(columns))
