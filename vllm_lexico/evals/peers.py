"""Faults of vLLM's own caches that would be measured as the caches' loss, and their fixes."""

from __future__ import annotations

import functools
from typing import Any


def fix_turboquant(_worker: Any = None) -> None:
    """Let TurboQuant's prefill see all that is cached of a request. Runs in each worker; again it changes nothing.

    Why: vLLM takes a batch whose longest query is as long as its longest sequence for one of prompts that all start
    now. A request that goes on after a prefix hit or a split of its prompt, together with a longer one that starts,
    then attends to nothing but its own chunk, and its answer is nonsense (in 0.32 and 0.33). How: where such a request
    is in the batch, the metadata's longest query is 0, as long as no sequence; vLLM then goes through the requests one
    by one, as it does for batches without one that starts. Nothing else reads it there. Upstream:
    https://github.com/vllm-project/vllm/issues/46460. Can go when the pull request 46461, or what takes its place, is
    in the oldest vLLM that is supported.
    """
    from vllm.v1.attention.backends.turboquant_attn import TurboQuantMetadataBuilder

    original = TurboQuantMetadataBuilder.build
    if getattr(original, "lexico", False):
        return

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata = original(self, *args, **kwargs)
        if metadata.is_prefill and _some_continue(metadata):
            metadata.max_query_len = 0
        return metadata

    build.lexico = True  # type: ignore[attr-defined]
    TurboQuantMetadataBuilder.build = build


def _some_continue(metadata: Any) -> bool:
    """Whether a request in prefill has cached tokens; taken for granted where only the device knows."""
    if metadata.seq_lens_cpu is None or metadata.query_start_loc_cpu is None:
        return True
    query_lens = metadata.query_start_loc_cpu.diff()[metadata.num_decodes :]
    return bool((metadata.seq_lens_cpu[metadata.num_decodes :] > query_lens).any())
