"""Bytes of the KV cache as the engine has them: what a sequence held when it ended, and what a token adds to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

PLAIN_NUMBER_BYTES = 2  # 16 bits


@dataclass(frozen=True)
class Held:
    """What one finished sequence held.

    Attributes:
        tokens: computed ones, the last sampled token never is.
        bytes: of its pages.
        plain_bytes: of what the model's layers keep of so many tokens in 16 bits, windows and states among it.
    """

    tokens: int
    bytes: int
    plain_bytes: int = 0


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
                tokens = request.num_computed_tokens
                plain = plain_sequence_bytes(kv_cache_config, tokens)
                self._ended.append(Held(tokens, blocks * self._block_bytes, plain))
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


def token_bytes(kv_cache_config: Any, max_model_len: int) -> float:
    """Bytes that a further token takes in the pool of a long sequence, of the groups that grow with it.

    Args:
        kv_cache_config: the scheduler's.
        max_model_len: tokens of the longest sequence; a window of so many grows as full attention does.
    """
    block, growing = block_bytes(kv_cache_config), _growing(kv_cache_config, max_model_len)
    return sum(block / spec.block_size for _, spec in growing)


def plain_token_bytes(kv_cache_config: Any, max_model_len: int) -> int:
    """Bytes of a token's keys and values in 16 bits, in the same layers that `token_bytes` counts, of this rank."""
    return sum(count * _plain_bytes(spec) for count, spec in _growing(kv_cache_config, max_model_len))


def plain_sequence_bytes(kv_cache_config: Any, tokens: int) -> int:
    """Bytes of what the layers of this rank keep of a sequence in 16 bits: all tokens, a window, a chunk or a state."""
    return sum(count * _plain_bytes(spec) * _kept_tokens(spec, tokens) for count, spec in _groups(kv_cache_config))


def capacity_tokens(kv_cache_config: Any, max_model_len: int) -> int:
    """Tokens of sequences that the pool holds, without their tails, windows and states.

    Where nothing grows to the end of a sequence, as many as one layer's pages could hold.
    """
    specs = [spec for _, spec in _growing(kv_cache_config, max_model_len)]
    if not specs:
        groups = _groups(kv_cache_config)
        return kv_cache_config.num_blocks * max(spec.block_size for _, spec in groups) // len(groups)
    return int(kv_cache_config.num_blocks / sum(1 / spec.block_size for spec in specs))


def _growing(kv_cache_config: Any, max_model_len: int) -> list[tuple[int, Any]]:
    """Groups whose pages of a sequence grow with it to its end."""
    groups = _groups(kv_cache_config)
    return [(count, spec) for count, spec in groups if _kept_tokens(spec, max_model_len) >= max_model_len]


def _groups(kv_cache_config: Any) -> list[tuple[int, Any]]:
    """How many of the model's layers a group has, and their spec.

    A layer whose name is another's and more stands beside that one, as the tail of a layer of LEXICO's does, and is
    none of the model's.
    """
    groups = [(group.layer_names, group.kv_cache_spec) for group in kv_cache_config.kv_cache_groups]
    known = {name for names, _ in groups for name in names}
    own = [(sum(name.rpartition(".")[0] not in known for name in names), spec) for names, spec in groups]
    return [(count, spec) for count, spec in own if count]


def _kept_tokens(spec: Any, tokens: int) -> int:
    """Of so many tokens, those that a layer's pages keep; 1 for a state, 0 for what is no cache of a decoder.

    Where vLLM cannot give layers with windows pages of their own it keeps all tokens, in the spec of full attention.
    """
    from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, MambaSpec

    if isinstance(spec, MambaSpec):
        return 1
    if not isinstance(spec, AttentionSpec) or isinstance(spec, FullAttentionSpec):
        return tokens
    reach = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    return 0 if reach is None else min(reach, tokens)


def _plain_bytes(spec: Any) -> int:
    """Of a layer: what a token takes in 16 bits, or the whole state."""
    from vllm.v1.kv_cache_interface import MambaSpec, MLAAttentionSpec

    if isinstance(spec, MambaSpec):
        return replace(spec, page_size_padded=None).page_size_bytes
    numbers = spec.head_size if isinstance(spec, MLAAttentionSpec) else spec.head_size + spec.head_size_v
    return PLAIN_NUMBER_BYTES * spec.num_kv_heads * numbers


def summarize_held(ended: list[Held]) -> dict[str, Any]:
    """Means over sequences; bytes_per_token is all their bytes over all their tokens, plain_ the same in 16 bits."""
    tokens, held, plain = (sum(getattr(one, name) for one in ended) for name in ("tokens", "bytes", "plain_bytes"))
    return {
        "sequences": len(ended),
        "tokens": tokens / len(ended) if ended else None,
        "bytes": held / len(ended) if ended else None,
        "bytes_per_token": held / tokens if tokens else None,
        "plain_bytes_per_token": plain / tokens if tokens else None,
    }
