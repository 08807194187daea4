"""Bytes of the KV cache as the engine has them: what a sequence held when it ended, and what a token adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Held:
    """What one finished sequence held. tokens: computed ones, the last sampled token never is; bytes: of its pages."""

    tokens: int
    bytes: int


class PoolMeter:
    """Reads the block pool of an engine in this process; every sequence is measured at its end.

    Why: vLLM tells only the use of the whole pool, and when a request's result comes its blocks are back already. How:
    the manager's `free` is wrapped and counts the request's blocks first. Upstream: no issue is known. Can go when vLLM
    reports the blocks of a finished request.

    Args:
        scheduler: vLLM's, of an engine in this process.
        kv_cache_config: that the scheduler was made with.

    Attributes:
        finished: sequences that ended since the meter was made.
    """

    def __init__(self, scheduler: Any, kv_cache_config: Any) -> None:
        self.finished = 0
        self._ended: list[Held] = []
        self._block_bytes = block_bytes(kv_cache_config)
        manager = scheduler.kv_cache_manager
        give_back = manager.free

        def free(request: Any) -> None:
            if request.is_finished():  # preempted requests give their blocks back too, and come again
                groups = manager.get_blocks(request.request_id).blocks
                blocks = sum(not block.is_null for group in groups for block in group)
                self._ended.append(Held(request.num_computed_tokens, blocks * self._block_bytes))
                self.finished += 1
            give_back(request)

        manager.free = free

    def take(self) -> list[Held]:
        """Sequences that ended since the last call."""
        ended, self._ended = self._ended, []
        return ended


def block_bytes(kv_cache_config: Any) -> int:
    """Bytes of one block of the pool, whichever group has it: its share of the allocation, padding and all.

    Why: the groups' specs do not say it. Of a group whose layers have pages of unlike sizes vLLM tells the scheduler
    the first layer's alone (`generate_scheduler_kv_cache_config`), and TurboQuant's first layers are in 16 bits. How:
    every tensor of the configuration names the size of the one allocation that all layers of all groups lie in.
    Upstream: no issue is known. Can go when the scheduler's configuration has the bytes of a block.

    Raises:
        ValueError: there are several allocations; vLLM's worker refuses them too.
    """
    (allocation,) = {tensor.size for tensor in kv_cache_config.kv_cache_tensors if not tensor.host_resident}
    return allocation // kv_cache_config.num_blocks


def token_bytes(kv_cache_config: Any) -> float:
    """Bytes that a further token takes in the pool of a long sequence: windows, which do not grow, are left out."""
    block = block_bytes(kv_cache_config)
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    return sum(block / spec.block_size for spec in specs if not getattr(spec, "sliding_window", None))


def plain_token_bytes(vllm_config: Any) -> int:
    """Bytes of a token's keys and values in 16 bits in all attention layers of this rank."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    return 2 * 2 * model.get_num_kv_heads(parallel) * model.get_head_size() * model.get_num_layers(parallel)


def summarize_held(ended: list[Held]) -> dict[str, Any]:
    """Means over sequences; bytes_per_token is all their bytes over all their tokens."""
    tokens, held = sum(one.tokens for one in ended), sum(one.bytes for one in ended)
    return {
        "sequences": len(ended),
        "tokens": tokens / len(ended) if ended else None,
        "bytes": held / len(ended) if ended else None,
        "bytes_per_token": held / tokens if tokens else None,
    }
