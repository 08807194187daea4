"""What LEXICO cannot serve, each as one sentence with the reason and the remedy."""

from __future__ import annotations

from typing import Any

SUPPORTED_HEAD_SIZES = (64, 128)
SUPPORTED_BLOCK_SIZES = (64, 128, 256)
DRAFTS_WITHOUT_ATTENTION = ("ngram", "ngram_gpu", "suffix")
OTHER_BACKEND = "choose another --attention-backend for this model"


def engine_refusals(vllm_config: Any) -> list[str]:
    """Reasons that follow from the engine's configuration alone; empty where there are none.

    Args:
        vllm_config: vLLM's `VllmConfig`, read only.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    connector = vllm_config.kv_transfer_config
    draft = vllm_config.speculative_config
    reasons = []
    if cache.cache_dtype not in ("auto", "float16", "bfloat16"):
        reasons.append(_kv_cache_dtype(cache.cache_dtype))
    if model.use_mla:
        reasons.append(_mla())
    if model.is_hybrid:
        reasons.append(f"models that mix Mamba or linear attention with attention are not supported; {OTHER_BACKEND}")
    if model.is_encoder_decoder:
        reasons.append(_encoder())
    if scheduler.disable_hybrid_kv_cache_manager:
        reasons.append(_hybrid_manager_off(connector))
    elif connector is not None:
        reasons.append(
            f"KV connector {connector.kv_connector} is not supported: it would bring codes without their first "
            "full-precision tokens; start without --kv-transfer-config"
        )
    if parallel.decode_context_parallel_size > 1:
        reasons.append(_dcp())
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        reasons.append("prefill context parallelism is not supported; leave --prefill-context-parallel-size at 1")
    if getattr(parallel, "use_ubatching", False):
        reasons.append("dual batch overlap is not supported; start without --enable-dbo")
    if draft is not None and draft.method not in DRAFTS_WITHOUT_ATTENTION:
        reasons.append(
            f"speculative method {draft.method!r} is not supported: its draft layers have no dictionary; "
            f"use one of {', '.join(DRAFTS_WITHOUT_ATTENTION)}, or serve without drafts"
        )
    block_size = cache.block_size
    if getattr(cache, "user_specified_block_size", False) and block_size not in SUPPORTED_BLOCK_SIZES:
        sizes = ", ".join(map(str, SUPPORTED_BLOCK_SIZES))
        reasons.append(f"--block-size {block_size} is not supported; leave it out (128) or give one of {sizes}")
    return reasons


def selector_refusals(selected: dict[str, Any]) -> list[str]:
    """Reasons that follow from what vLLM's backend selector says about a layer.

    Args:
        selected: the keyword arguments of `AttentionBackend.validate_configuration`; missing ones mean no.
    """
    reasons = []
    if selected.get("kv_cache_dtype") not in (None, "auto", "float16", "bfloat16"):
        reasons.append(_kv_cache_dtype(selected["kv_cache_dtype"]))
    if selected.get("use_mla"):
        reasons.append(_mla())
    elif selected.get("head_size") not in SUPPORTED_HEAD_SIZES:
        sizes = " and ".join(map(str, SUPPORTED_HEAD_SIZES))
        reasons.append(f"head size {selected.get('head_size')} is not supported, only {sizes}; {OTHER_BACKEND}")
    if selected.get("has_sliding_window"):
        reasons.append(_sliding_window())
    if selected.get("has_sink"):
        reasons.append(f"learned attention sinks (as in gpt-oss) are not supported; {OTHER_BACKEND}")
    if selected.get("attn_type", "decoder") != "decoder":
        reasons.append(_encoder())
    if selected.get("use_dcp"):
        reasons.append(_dcp())
    return reasons


def layer_refusals(
    *,
    alibi_slopes: Any = None,
    sliding_window: int | None = None,
    logits_soft_cap: float | None = None,
    attn_type: str = "decoder",
    kv_sharing_target: str | None = None,
    sinks: Any = None,
) -> list[str]:
    """Reasons that only the arguments of a layer's implementation show."""
    reasons = []
    if alibi_slopes is not None:
        reasons.append(f"ALiBi position biases are not supported; {OTHER_BACKEND}")
    if sliding_window is not None:
        reasons.append(_sliding_window())
    if logits_soft_cap:
        reasons.append(f"a soft cap on attention logits ({logits_soft_cap}) is not supported; {OTHER_BACKEND}")
    if attn_type != "decoder":
        reasons.append(_encoder())
    if kv_sharing_target is not None:
        reasons.append(
            f"layers that share the cache of another ({kv_sharing_target}) are not supported; {OTHER_BACKEND}"
        )
    if sinks is not None:
        reasons.append(f"learned attention sinks (as in gpt-oss) are not supported; {OTHER_BACKEND}")
    return reasons


def refuse(reasons: list[str]) -> None:
    """Raise where there is a reason to.

    Raises:
        ValueError: all reasons, one after another.
    """
    if reasons:
        raise ValueError("LEXICO cannot serve this: " + "; ".join(reasons))


def _kv_cache_dtype(given: str) -> str:
    return f"--kv-cache-dtype {given} is not supported: codes replace the cache's number format; leave it at auto"


def _mla() -> str:
    return f"multi-head latent attention (MLA) is not supported; {OTHER_BACKEND}"


def _sliding_window() -> str:
    return f"sliding-window layers are not supported: their pages have another size; {OTHER_BACKEND}"


def _encoder() -> str:
    return f"encoder and encoder-decoder attention is not supported, only decoders; {OTHER_BACKEND}"


def _dcp() -> str:
    return "decode context parallelism is not supported; leave --decode-context-parallel-size at 1"


def _hybrid_manager_off(connector: Any) -> str:
    if connector is not None:
        return (
            f"KV connector {connector.kv_connector} turns the hybrid KV cache manager off, which the full-precision "
            "tokens need; start without --kv-transfer-config"
        )
    return (
        "the hybrid KV cache manager is off, which the full-precision tokens need; start without "
        "--disable-hybrid-kv-cache-manager"
    )
