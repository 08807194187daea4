"""What LEXICO relies on in vLLM's workers: configurations, layers, backends, and how a backend is chosen."""

from __future__ import annotations

import functools
import inspect
import pickle
from typing import Any

from vllm import config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention import backend, selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_lexico import NAME, compat
from vllm_lexico.serve.wiring import Behaviour, Wire, check


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


ROWS = (
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
        "max_query_len block_table_tensor slot_mapping causal",
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
        "impl attn_backend kv_cache_torch_dtype num_kv_heads head_size head_size_v sliding_window get_attn_backend",
        "a layer would keep raw pages",
    ),
    Wire(
        config.AttentionConfig,
        "backend backend_per_kind",
        "layers with a window would be taken for layers without",
    ),
    Wire(
        config.CacheConfig,
        "mamba_block_size mamba_cache_mode prefix_match_unit",
        "states would be kept where no prefix is found, or be those of other tokens",
    ),
    Wire(
        config.VllmConfig,
        "validate_block_size",
        "prompts would be cut where no state is kept, and answered from others'",
    ),
    Wire(
        AttentionLayerBase,
        "get_kv_cache_spec get_attn_backend kv_cache",
        "the full-precision tokens would have no pages",
    ),
    Wire(
        config.VllmConfig,
        "additional_config kv_transfer_config speculative_config compilation_config num_speculative_tokens "
        "max_concurrent_batches max_in_flight_tokens",
        "settings or drafts would be ignored",
    ),
    Wire(
        config.SpeculativeConfig,
        "method attention_backend draft_model_config use_gemma4_mtp use_multi_module_mtp enable_adaptive_verification",
        "layers of drafts would be taken for the model's",
    ),
    Wire(config.VllmConfig, "num_lookahead_tokens", "the tokens of drafts would have no pages"),
    Wire(config.VllmConfig, "use_v2_model_runner", "a draft model would get another group's block table"),
    Wire(
        config.ModelConfig,
        "use_mla is_hybrid is_encoder_decoder is_mm_prefix_lm hf_text_config",
        "such models would be served wrongly",
    ),
    Wire(config.ModelConfig, "hf_overrides", "a dictionary would be trained for the model without them"),
    Wire(config.CacheConfig, "cache_dtype block_size user_specified_block_size", "they would be ignored"),
    Wire(config.CacheConfig, "kv_offloading_size", "a refusal would name a flag that was not given"),
    Wire(
        config.ParallelConfig,
        "decode_context_parallel_size prefill_context_parallel_size use_ubatching",
        "ranks would each see a part of a context and answer from it",
    ),
    Wire(
        config.SchedulerConfig,
        "disable_hybrid_kv_cache_manager max_num_seqs max_num_batched_tokens max_num_scheduled_tokens",
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
    Behaviour("extract_layer_index", "layers would be coded with the dictionaries of others", _layer_index),
    Behaviour("AttentionBackendEnum member", "a spawned engine would not know the name", _pickled_name),
    Behaviour("CpuPlatform.get_attn_backend_cls", "another backend would be used in silence", _cpu_platform),
    Behaviour("merge_attn_states", "prompts would attend wrongly", _merged_in_order),
    Behaviour("AttentionBackend.forward_includes_kv_cache_update", "tokens would not be stored", _update_in_forward),
)


@functools.cache
def check_layers(*ours: type) -> None:
    """Test once in this process that vLLM's layers and backends are what ours expect.

    Args:
        ours: the classes that `ROWS` names.

    Raises:
        ValueError: one sentence that says what is otherwise.
    """
    check(ROWS, *ours)
