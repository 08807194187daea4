"""What LEXICO relies on in vLLM that vLLM does not promise: one table, and the self-test at start that reads it.

A name of this table that is gone or means something else would leave an engine that starts and then answers wrongly,
or holds more memory than it says. The self-test runs where LEXICO is really used, in workers and where the scheduler
is, takes milliseconds, and ends the start with one sentence. Names that our modules import need no row: where one is
gone nothing loads (`compat.failures_in_a_sentence`). Workarounds are in `compat.py`.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from vllm import config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention import backend, selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_lexico import NAME, compat
from vllm_lexico.serve import dry_run


@dataclass(frozen=True)
class Wire:
    """Names of one class of vLLM.

    names: attributes, fields, or what its methods set.
    breaks: what would happen where one is another and nobody noticed.
    ours: classes of this package whose methods of these names vLLM calls, so that they must take what vLLM's do.
    """

    owner: type
    names: str
    breaks: str
    ours: str = ""


@dataclass(frozen=True)
class Behaviour:
    """What a name does, where its being there says too little.

    check: says what this vLLM does instead; None where it does what is relied on.
    """

    name: str
    breaks: str
    check: Callable[[], str | None]


WIRES = (
    Wire(backend.AttentionBackend, "customize_spec", "code pages would have the size of raw ones"),
    Wire(
        backend.AttentionBackend,
        "get_supported_kernel_block_sizes supports_block_size get_preferred_block_size",
        "vLLM could choose, or cut, blocks that have no layout",
    ),
    Wire(backend.AttentionBackend, "supported_kv_cache_layouts", "a page could be scattered over memory"),
    Wire(
        backend.AttentionBackend,
        "validate_configuration supported_dtypes",
        "what is not supported would be served",
    ),
    Wire(
        backend.AttentionBackend,
        "get_name get_impl_cls get_builder_cls",
        "layers would get another backend's parts",
    ),
    Wire(
        backend.AttentionMetadataBuilder,
        "build",
        "a step would be coded and read by another plan",
        "LexicoMetadataBuilder LexicoTailMetadataBuilder",
    ),
    Wire(
        backend.AttentionMetadataBuilder,
        "_cudagraph_support _init_reorder_batch_threshold reorder_batch_threshold",
        "steps of decode would be taken for prompts, or not be captured in CUDA graphs",
    ),
    Wire(
        backend.CommonAttentionMetadata,
        "query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound num_reqs num_actual_tokens "
        "max_query_len block_table_tensor slot_mapping",
        "a step would not know its tokens or pages",
    ),
    Wire(
        backend.AttentionImpl,
        "__init__ forward process_weights_after_loading",
        "arguments would be taken for others, or no layer would get its dictionary",
        "LexicoImpl",
    ),
    Wire(
        Attention,
        "impl attn_backend kv_cache_torch_dtype num_kv_heads head_size get_attn_backend",
        "a layer would keep raw pages",
    ),
    Wire(
        AttentionLayerBase,
        "get_kv_cache_spec get_attn_backend kv_cache",
        "the full-precision tokens would have no pages",
    ),
    Wire(AttentionSpec, "state_content_bytes page_size_padded page_size_bytes", "pages would have other bytes"),
    Wire(
        SlidingWindowSpec,
        "sliding_window extra_retained_tokens max_admission_blocks_per_request",
        "more requests would be admitted than there are pages for",
    ),
    Wire(
        SlidingWindowManager,
        "get_num_blocks_to_allocate allocate_new_blocks add_local_computed_blocks pop_blocks_for_free "
        "remove_skipped_blocks cache_blocks reachable_block_mask find_longest_cache_hit new_step_starts",
        "sinks would be freed, the window kept whole, or pages read before they are coded",
        "LexicoTailManager",
    ),
    Wire(
        SlidingWindowManager,
        "get_num_skipped_tokens req_to_blocks num_cached_block block_pool block_size kv_cache_spec "
        "cache_hit_alignment_tokens max_admission_blocks_per_request new_block_ids _null_block "
        "_record_new_block_ids _get_num_evictable_blocks supports_fine_grained_hash_lookup",
        "the tail's manager would count pages wrongly",
    ),
    Wire(
        BlockPool,
        "get_new_blocks free_blocks touch get_cached_block null_block hash_block_size",
        "pages would be lost or shared",
    ),
    Wire(KVCacheBlock, "is_null ref_cnt block_id", "pages would be counted wrongly"),
    Wire(
        KVCacheSpecRegistry,
        "_ensure_registered register get_manager_class",
        "the tail's pages would get a manager that frees sinks",
    ),
    Wire(
        config.VllmConfig,
        "additional_config kv_transfer_config speculative_config compilation_config num_speculative_tokens "
        "max_concurrent_batches max_in_flight_tokens",
        "settings or drafts would be ignored",
    ),
    Wire(config.ModelConfig, "use_mla is_hybrid is_encoder_decoder", "such models would be served wrongly"),
    Wire(config.CacheConfig, "cache_dtype block_size user_specified_block_size", "they would be ignored"),
    Wire(
        config.ParallelConfig,
        "decode_context_parallel_size prefill_context_parallel_size use_ubatching",
        "ranks would each see a part of a context and answer from it",
    ),
    Wire(
        config.SchedulerConfig,
        "disable_hybrid_kv_cache_manager max_num_seqs max_num_batched_tokens",
        "every token would be kept in full precision, or buffers be too small",
    ),
    Wire(
        config.CompilationConfig,
        "static_forward_context max_cudagraph_capture_size",
        "shadow layers would get no pages, or buffers be too small",
    ),
    Wire(
        selector.AttentionSelectorConfig,
        "head_size kv_cache_dtype attn_type use_mla has_sink has_sliding_window use_dcp",
        "what is not supported would be served",
    ),
)


def _layer_index() -> str | None:
    wanted = {"model.layers.7.self_attn.attn": 7, "language_model.model.layers.11.self_attn.attn": 11}
    given = {name: extract_layer_index(name) for name in wanted}
    return None if given == wanted else f"takes layers {list(wanted.values())} for {list(given.values())}"


def _pickled_name() -> str | None:
    member = AttentionBackendEnum[NAME]
    parts: Any = member.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    called = parts[0] is compat.registered_member
    return None if called and pickle.loads(pickle.dumps(member)) is member else "does not pickle as a call of ours"


def _cpu_platform() -> str | None:
    if not current_platform.is_cpu():
        return None
    chooser: Any = inspect.unwrap(selector._cached_get_attn_backend)
    wrapped = getattr(current_platform.get_attn_backend_cls, "lexico", False)
    chooses = wrapped and "get_attn_backend_cls" in chooser.__code__.co_names
    return None if chooses else "is not the function that chooses a backend"


def _merged_in_order() -> str | None:
    wanted = ["output", "prefix_output", "prefix_lse", "suffix_output", "suffix_lse", "output_lse"]
    given = list(inspect.signature(merge_attn_states).parameters)
    return None if given[: len(wanted)] == wanted else f"takes {given}"


def _update_in_forward() -> str | None:
    given = getattr(backend.AttentionBackend, "forward_includes_kv_cache_update", None)
    return None if given is True else f"is {given}"


def _masked_tables() -> str | None:
    """The V2 runner's tables, where this process has them."""
    tables = getattr(sys.modules.get("vllm.v1.worker.gpu.block_table"), "BlockTables", None)
    runner = getattr(sys.modules.get("vllm.v1.worker.gpu.model_runner"), "GPUModelRunner", None)
    if tables is None or runner is None or not _mentions(tables, "window"):
        return None  # as in 0.32: nothing of a table is nulled
    if _mentions(runner, "num_retained_tokens") and _has(SlidingWindowSpec, "num_retained_tokens"):
        return None
    return "is not what the worker asks before it nulls a table's first entries"


def _steps_announced() -> str | None:
    """The scheduler, where this process has it."""
    scheduler = getattr(sys.modules.get("vllm.v1.core.sched.scheduler"), "Scheduler", None)
    told = scheduler is None or "new_step_starts" in scheduler.schedule.__code__.co_names
    return None if told else "is not called by Scheduler.schedule"


BEHAVIOURS = (
    Behaviour("extract_layer_index", "layers would be coded with the dictionaries of others", _layer_index),
    Behaviour("AttentionBackendEnum member", "a spawned engine would not know the name", _pickled_name),
    Behaviour("CpuPlatform.get_attn_backend_cls", "another backend would be used in silence", _cpu_platform),
    Behaviour("merge_attn_states", "prompts would attend wrongly", _merged_in_order),
    Behaviour("AttentionBackend.forward_includes_kv_cache_update", "tokens would not be stored", _update_in_forward),
    Behaviour("SlidingWindowSpec.num_retained_tokens", "sinks would be read from page 0", _masked_tables),
    Behaviour("KVCacheManager.new_step_starts", "prefixes would never be found whole again", _steps_announced),
)


def failures(*ours: type) -> Iterator[str]:
    """What of the table does not hold in this vLLM, each as a clause.

    Args:
        ours: classes of this package whose methods vLLM calls; rows for other classes are checked for names only.
    """
    by_name = {one.__name__: one for one in ours}
    for wire in WIRES:
        for name in wire.names.split():
            problem = None if _has(wire.owner, name) else "is gone"
            for called in (by_name[own] for own in wire.ours.split() if own in by_name and not problem):
                problem = _called_otherwise(getattr(wire.owner, name), getattr(called, name))
            if problem:
                yield f"{wire.owner.__name__}.{name} {problem}, so {wire.breaks}"
    for behaviour in BEHAVIOURS:
        try:
            problem = behaviour.check()
        except Exception as error:
            problem = f"fails ({type(error).__name__}: {error})"
        if problem:
            yield f"{behaviour.name} {problem}, so {behaviour.breaks}"


def check(manager: type, tail_spec: Any, *ours: type) -> None:
    """The self-test: the table, then a dry run of vLLM's KV cache manager; once a process and set of classes.

    Args:
        manager: the manager of the tail's pages.
        tail_spec: a cache spec of a tail.
        ours: other classes of this package whose methods vLLM calls.

    Raises:
        ValueError: one sentence that names what this vLLM has changed and what it would break.
    """
    classes = (manager, *ours)
    if classes in _checked:
        return
    _checked.add(classes)  # first, since the dry run comes here again
    if found := list(failures(*classes)):
        raise compat.does_not_fit("; ".join(found))
    with compat.failures_in_a_sentence("a dry run of its KV cache manager"):
        dry_run.rehearse(manager, tail_spec)


_checked: set[tuple[type, ...]] = set()


def _has(owner: Any, name: str) -> bool:
    """Whether a class has an attribute or a field of this name, or a method of it sets one."""
    if name in getattr(owner, "__dataclass_fields__", {}) or any(name in vars(base) for base in owner.__mro__):
        return True
    return name in _set_by_methods(owner)


@functools.cache
def _set_by_methods(owner: type) -> set[str]:
    methods = [one for base in owner.__mro__ if base.__module__.startswith("vllm.") for one in _functions(base)]
    instructions = itertools.chain.from_iterable(map(dis.get_instructions, methods))
    return {one.argval for one in instructions if one.opname == "STORE_ATTR"}


def _functions(owner: type) -> list[FunctionType]:
    return [one for one in vars(owner).values() if isinstance(one, FunctionType)]


def _mentions(owner: type, word: str) -> bool:
    """Whether an own method of a class uses an attribute, or takes an argument, whose name has this word in it."""
    used = [(*one.__code__.co_names, *one.__code__.co_varnames) for one in _functions(owner)]
    return any(word in name for names in used for name in names)


def _called_otherwise(theirs: Any, own: Any) -> str | None:
    """How a call that fits vLLM's method does not fit ours."""
    kinds = inspect.Parameter
    given, taken = (list(inspect.signature(one).parameters.values()) for one in (theirs, own))
    takes_more = {one.kind for one in taken} & {kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD}
    known = {one.name for one in taken}
    unknown = [one.name for one in given if one.name not in known]
    order = [one.name for one in taken if one.kind is kinds.POSITIONAL_OR_KEYWORD]
    positional = [one.name for one in given if one.kind is kinds.POSITIONAL_OR_KEYWORD]
    if (unknown and not takes_more) or any(a != b for a, b in zip(order, positional, strict=False)):
        return f"takes other arguments ({', '.join(unknown or positional)})"
    return None
