"""What LEXICO relies on where vLLM's scheduler hands out pages."""

from __future__ import annotations

import inspect
import sys
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_lexico import compat
from vllm_lexico.serve.wiring import Behaviour, Wire, check, dry_run, has, mentions


def _masked_tables() -> str | None:
    """The V2 runner's tables, where this process has them."""
    tables = getattr(sys.modules.get("vllm.v1.worker.gpu.block_table"), "BlockTables", None)
    runner = getattr(sys.modules.get("vllm.v1.worker.gpu.model_runner"), "GPUModelRunner", None)
    if tables is None or runner is None or not mentions(tables, "window"):
        return None  # as in 0.32: nothing of a table is nulled
    if mentions(runner, "num_retained_tokens") and has(SlidingWindowSpec, "num_retained_tokens"):
        return None
    return "is not what the worker asks before it nulls a table's first entries"


def _steps_announced() -> str | None:
    """The scheduler, where this process has it."""
    scheduler = getattr(sys.modules.get("vllm.v1.core.sched.scheduler"), "Scheduler", None)
    if scheduler is None:
        return None
    schedule: Any = inspect.unwrap(scheduler.schedule)  # as it is written, where a tracer or a profiler wraps it
    return None if "new_step_starts" in schedule.__code__.co_names else "is not called by Scheduler.schedule"


ROWS = (
    Wire(FullAttentionSpec, "non_causal", "attention in both directions would be made causal"),
    Wire(AttentionSpec, "state_content_bytes page_size_padded page_size_bytes", "pages would have other bytes"),
    Wire(
        SlidingWindowSpec,
        "sliding_window extra_retained_tokens max_admission_blocks_per_request",
        "more requests would be admitted than there are pages for",
    ),
    Wire(
        SlidingWindowManager,
        "get_num_blocks_to_allocate allocate_new_blocks add_local_computed_blocks allocate_external_computed_blocks "
        "pop_blocks_for_free remove_skipped_blocks cache_blocks reachable_block_mask find_longest_cache_hit "
        "new_step_starts get_num_skipped_tokens",
        "sinks would be freed, the window kept whole, or pages read before they are coded",
        "LexicoTailManager",
    ),
    Wire(
        SlidingWindowManager,
        "req_to_blocks num_cached_block block_pool block_size kv_cache_spec "
        "cache_hit_alignment_tokens max_admission_blocks_per_request new_block_ids _null_block "
        "_record_new_block_ids _get_num_evictable_blocks supports_fine_grained_hash_lookup",
        "the tail's manager would count pages wrongly",
    ),
    Wire(
        BlockPool,
        "get_new_blocks free_blocks touch get_cached_block null_block hash_block_size",
        "pages would be lost or shared",
    ),
    Wire(BlockPool, "take_events cache_partial_block", "KV events would tell of blocks that nothing can hit"),
    Wire(KVCacheBlock, "is_null ref_cnt block_id", "pages would be counted wrongly"),
    Wire(
        KVCacheSpecRegistry,
        "_ensure_registered register get_manager_class",
        "the tail's pages would get a manager that frees sinks",
    ),
    Behaviour("SlidingWindowSpec.num_retained_tokens", "sinks would be read from page 0", _masked_tables),
    Behaviour("KVCacheManager.new_step_starts", "prefixes would never be found whole again", _steps_announced),
)
_checked: list[type] = []


def check_pages(manager: type, spec: type) -> None:
    """Test once in this process that vLLM manages the tail's pages as their manager expects.

    Args:
        manager: `LexicoTailManager`.
        spec: `LexicoTailSpec`.

    Raises:
        ValueError: one sentence that says what is otherwise.
    """
    if manager in _checked:
        return
    _checked.append(manager)  # first, since the dry run comes here again
    check(ROWS, manager)
    with compat.failures_in_a_sentence("a dry run of its KV cache manager"):
        dry_run.rehearse(manager, spec)
