"""What LEXICO relies on in vLLM's KV connectors; each table is read where its connector is made."""

from __future__ import annotations

from typing import Any

from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

from vllm_lexico.serve.wiring import Wire, check


def check_offloading(scheduler: type, ours: type) -> None:
    """Test that `OffloadingConnectorScheduler` is the one that ours was written for; ValueError if not."""
    _check(
        scheduler,
        ours,
        "config manager _lookup_groups _full_attention_groups _chunks_being_loaded _current_batch_allocated_block_ids "
        "_req_status _jobs _job_counter _current_batch_load_jobs",
        "_lookup update_state_after_alloc _reachable_store_block_mask",
    )


def check_simple_cpu(scheduler: type, ours: type) -> None:
    """Test that `SimpleCPUOffloadScheduler` is the one that ours was written for; ValueError if not."""
    _check(
        scheduler,
        ours,
        "cpu_kv_cache_config cpu_block_pool cpu_coordinator",
        "get_num_new_matched_tokens _select_eager_blocks_to_store",
    )


def check_groups() -> None:
    """Test that a group's own specs are where the adoption of connectors looks for them; ValueError if not."""
    check((Wire(UniformTypeKVCacheSpecs, "kv_cache_specs", "a connector would be refused beside drafts"),))


def check_nixl(scheduler: type, ours: type, worker: type) -> None:
    """Test that Nixl's parts are those that ours were written for; ValueError if not."""
    _check(
        scheduler,
        ours,
        "kv_cache_config",
        "request_finished get_num_new_matched_tokens update_state_after_alloc get_exchange_clipped_blocks",
    )
    check((Wire(worker, "compat_hash enforce_compat_hash", "another dictionary's codes would be read"),))


def _check(theirs: type, ours: Any, names: str, overridden: str) -> None:
    breaks = "a connector would bring codes without their first tokens, or pages that nothing was loaded into"
    check((Wire(theirs, names, breaks), Wire(theirs, overridden, breaks, ours.__name__)), ours)
