"""What LEXICO cannot serve, each as one clause with the reason and the remedy."""

from __future__ import annotations

from typing import Any

from vllm_lexico import NAME
from vllm_lexico.dictionary.coded_layers import are_mixed
from vllm_lexico.errors import either, shown
from vllm_lexico.serve.allowed_connectors import connector_refusals

SUPPORTED_HEAD_SIZES = (64, 80, 96, 112, 128, 192, 256)
SUPPORTED_BLOCK_SIZES = (64, 128, 256)
DEFAULT_BLOCK_SIZE = 128
FITTING_BLOCK_SIZES = (128, 256, 512, 1024)  # beside layers whose raw tokens have to fit a page of codes
STATE_BLOCK_SIZES = (128, 256, 512, 1024, 2048, 4096)  # beside layers that keep a state
HALF_DTYPES = ("bfloat16", "float16")
DRAFTS_WITHOUT_ATTENTION = ("ngram", "ngram_gpu", "suffix")
DRAFTS_BY_A_MODEL = ("eagle", "eagle3", "mtp", "draft_model", "dflash")
DEALT_OUT = "it deals neighbouring tokens out to ranks, which are coded and read together"
OTHER_BACKEND = "choose another --attention-backend for this model"
ATTENTION_CLASSES = {  # how the names of vLLM's other layers, and of the backends that they wrap, begin
    "ChunkedLocalAttention": "local attention within chunks (as in Llama 4)",
    "CrossAttention": "attention to an encoder's output",
    "EncoderOnlyAttention": "attention in both directions",
    "PrefillPrefixLMAttention": "attention in both directions over a prompt",
    "RSWAAttention": "reference sliding-window attention",
    "StaticSink": "attention to learned tokens before the first",
    "WhisperCausalAttention": "attention with pooled blocks",
}


def engine_refusals(vllm_config: Any) -> list[str]:
    """Reasons that follow from the engine's configuration alone; empty where there are none.

    Args:
        vllm_config: vLLM's `VllmConfig`, read only.
    """
    model, cache = vllm_config.model_config, vllm_config.cache_config
    parallel, scheduler = vllm_config.parallel_config, vllm_config.scheduler_config
    connector = vllm_config.kv_transfer_config
    reasons = _kv_cache_dtype(cache.cache_dtype, model.dtype)
    if model.use_mla:
        reasons.append(_mla())
    if model.is_encoder_decoder:
        reasons.append(_encoder())
    if model.is_mm_prefix_lm:
        reasons.append(
            "prompts whose images are seen in both directions (as in Gemma 3) are not supported; to serve text alone "
            """start with --limit-mm-per-prompt '{"image": 0}'"""
        )
    if scheduler.disable_hybrid_kv_cache_manager:
        reasons.append(_hybrid_manager_off(connector, cache))
    elif connector is not None:
        reasons += connector_refusals(vllm_config, _asks_for_connector(cache))
    if parallel.decode_context_parallel_size > 1:
        reasons.append(_dcp())
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        reasons.append(
            f"prefill context parallelism is not supported: {DEALT_OUT}; leave --prefill-context-parallel-size at 1"
        )
    if getattr(parallel, "use_ubatching", False):
        reasons.append(
            "dual batch overlap is not supported: the halves of a step would share one list of tokens to code; "
            "start without --enable-dbo"
        )
    reasons += _drafts(vllm_config.speculative_config)
    if _table_is_mistaken(vllm_config):
        reasons.append(
            "a draft model beside layers with windows or chunks is not supported in vLLM's V1 runner, which hands it "
            f"another group's block table; use {either(DRAFTS_WITHOUT_ATTENTION)}, or serve without drafts"
        )
    if getattr(cache, "user_specified_block_size", False):
        reasons += _block_size(cache.block_size, _block_sizes(model))
    return reasons


def _table_is_mistaken(vllm_config: Any) -> bool:
    """Whether vLLM's V1 runner gives a draft model the first group's block table where that may not be its own."""
    drafts = vllm_config.speculative_config
    mixed = are_mixed(vllm_config.model_config.hf_text_config)
    return drafts is not None and drafts.method == "draft_model" and mixed and not vllm_config.use_v2_model_runner


def drafts_have_layers(vllm_config: Any) -> bool:
    """Whether an engine's drafts come from a model, whose layers have a cache of their own."""
    drafts = vllm_config.speculative_config
    return drafts is not None and drafts.method in DRAFTS_BY_A_MODEL


def _drafts(drafts: Any) -> list[str]:
    """Reasons in vLLM's `SpeculativeConfig`, None where there are no drafts."""
    if drafts is None or drafts.method in DRAFTS_WITHOUT_ATTENTION:
        return []
    if drafts.method not in DRAFTS_BY_A_MODEL:
        methods = either(DRAFTS_WITHOUT_ATTENTION + DRAFTS_BY_A_MODEL)
        return [f"speculative method {drafts.method!r} is not supported; use {methods}, or serve without drafts"]
    reasons, model = [], drafts.draft_model_config
    if getattr(drafts.attention_backend, "name", None) == NAME:
        reasons.append(
            f"drafts keep raw pages, which {NAME} does not read; leave attention_backend out of --speculative-config, "
            "or name another there"
        )
    if drafts.use_gemma4_mtp():
        reasons.append(drafts_share_cache("of the drafts", "the model"))
    if drafts.use_multi_module_mtp():
        reasons.append(
            "drafts by several MTP modules compute the end of a prompt more than once, which is not supported; start "
            "with 1 for num_speculative_tokens, which takes the first module alone"
        )
    if model.is_hybrid and drafts.method == "draft_model":
        reasons.append(drafts_keep_other("of the drafts", "state"))
    if drafts.enable_adaptive_verification:
        reasons.append("adaptive verification is not supported; leave enable_adaptive_verification at false")
    return reasons


def drafts_share_cache(name: str, target: str) -> str:
    """The reason where a layer of drafts reads the cache of a layer that is coded."""
    return (
        f"layer {name} has no cache and reads that of {target}, which is not supported for drafts; use "
        f"{either(DRAFTS_WITHOUT_ATTENTION)}, or serve without drafts"
    )


def drafts_keep_other(name: str, kept: str) -> str:
    """The reason where a layer of drafts keeps something else than tokens."""
    return f"layer {name} keeps a {kept}, which is not supported for drafts; use drafts that keep tokens alone"


def drafts_backend(backend: str, block_tokens: int) -> str:
    """The reason where the backend that vLLM takes for drafts cuts pages into smaller ones."""
    return (
        f"attention backend {backend}, which vLLM takes for the drafts, does not read pages of {block_tokens} tokens "
        """whole; name another with --speculative-config '{..., "attention_backend": "FLASH_ATTN"}'"""
    )


def model_refusals(vllm_config: Any) -> list[str]:
    """Reasons that a model's configuration shows before its layers are built, which would show them too.

    Args:
        vllm_config: vLLM's `VllmConfig`, read only; of a model that `engine_refusals` has nothing against.
    """
    model = vllm_config.model_config
    reasons = _head_size(model.get_head_size()) + _windows_off(model.hf_text_config)
    attention = vllm_config.attention_config
    backend = attention.backend_per_kind.get("sliding_window", attention.backend)
    if backend is not None and backend.name == NAME:
        reasons += _sliding_window(_window_of_layers(model, vllm_config.cache_config), model.max_model_len)
    return reasons


def codec_on_gpu(codec: str) -> str:
    """The reason where no kernel knows a codec, for engines that are not on a CPU."""
    return (
        f"codec {codec!r} has no kernels for a GPU, only 'packed16' has and, for tests, 'exact'; "
        "choose codec 'packed16', or serve on a CPU"
    )


def selector_refusals(selected: dict[str, Any]) -> list[str]:
    """Reasons that follow from what vLLM's backend selector says about a layer.

    It says that there is a sliding window and not how long it is: `layer_refusals` looks at that.

    Args:
        selected: the keyword arguments of `AttentionBackend.validate_configuration`; missing ones mean no.
    """
    reasons = _kv_cache_dtype(selected.get("kv_cache_dtype") or "auto", selected.get("dtype"))
    if selected.get("use_mla"):
        reasons.append(_mla())
    else:
        reasons += _head_size(selected.get("head_size"))
    if selected.get("block_size") not in (None, *STATE_BLOCK_SIZES):  # the engine's refusals know whether it has states
        reasons += _block_size(selected["block_size"], SUPPORTED_BLOCK_SIZES)
    if selected.get("attn_type", "decoder") != "decoder":
        reasons.append(_encoder())
    if selected.get("use_dcp"):
        reasons.append(_dcp())
    return reasons


def layer_refusals(
    *,
    max_model_len: int,
    alibi_slopes: Any = None,
    sliding_window: int | None = None,
    attn_type: str = "decoder",
    kv_sharing_target: str | None = None,
) -> list[str]:
    """Reasons that only the arguments of a layer's implementation show.

    Args:
        max_model_len: tokens of the longest sequence; a window that is not shorter never binds.
    """
    reasons = _sliding_window(sliding_window, max_model_len)
    if alibi_slopes is not None:
        reasons.append(f"ALiBi position biases are not supported; {OTHER_BACKEND}")
    if attn_type != "decoder":
        reasons.append(_encoder())
    if kv_sharing_target is not None:
        reasons.append(
            f"layers that share the cache of another ({kv_sharing_target}) are not supported; {OTHER_BACKEND}"
        )
    return reasons


def value_size_refusals(head_size: int, value_size: int, layer_name: str) -> list[str]:
    """Reasons that lie in the size of a layer's values, which a code has in common with keys."""
    if value_size == head_size:
        return []
    sizes = f"keys of {head_size} numbers and values of {value_size}"
    return [f"layer {layer_name} has {sizes}, which is not supported, only equal sizes are; {OTHER_BACKEND}"]


def attention_class_refusals(kind: type, served: type, layer_name: str = "") -> list[str]:
    """Reasons that the class of an attention layer shows.

    Only vLLM's `Attention` itself is served. Its subclasses attend, or keep their cache, in another way, and most wrap
    the backend that they are given for it: what they add would be lost with our pages, in silence.

    Args:
        kind: class of the layer, or of the backend that the layer gives itself.
        served: the only one that is served.
        layer_name: where it is known.
    """
    if kind is served:
        return []
    called, what = kind.__name__, ""
    for prefix, described in ATTENTION_CLASSES.items():
        if called.startswith(prefix):
            what = f", {described}"
    where = f" of layer {layer_name}" if layer_name else ""
    return [f"attention{where} is a {called}{what}, which is not supported, only plain Attention is; {OTHER_BACKEND}"]


def mask_refusals(causal: Any, non_causal: bool = False) -> list[str]:
    """Reasons that lie in who sees whom: tokens see what came before them, no more.

    Args:
        causal: of a step, as vLLM says it: a flag, or a tensor of one for each request.
        non_causal: of a layer's cache, as vLLM says it.
    """
    if causal is True and not non_causal:
        return []
    return [f"attention in both directions (causal is {shown(causal)} here) is not supported; {OTHER_BACKEND}"]


def uneven_refusals(vllm_config: Any) -> list[str]:
    """Where layers cannot share the bytes of a block: other layers have pages in it."""
    model = vllm_config.model_config
    beside = [
        name
        for name, there in (
            ("layers with states", model.is_hybrid),
            ("layers with windows", are_mixed(model.hf_text_config)),
            ("drafts by a model", drafts_have_layers(vllm_config)),
        )
        if there
    ]
    if not beside:
        return []
    return [f"the setting uneven is not supported beside {' and '.join(beside)}; leave it out"]


def as_sentence(reasons: list[str]) -> str:
    """All reasons, one after another."""
    return "LEXICO cannot serve this: " + "; ".join(reasons)


def refuse(reasons: list[str]) -> None:
    """Raise where there is a reason to.

    Raises:
        ValueError: all reasons in one sentence.
    """
    if reasons:
        raise ValueError(as_sentence(reasons))


def _kv_cache_dtype(given: str, model_dtype: Any) -> list[str]:
    """The tail's pages and what is computed with them have one number format, the model's."""
    own = dtype_name(model_dtype)
    if given in ("auto", own):
        return []
    remedy = f"--kv-cache-dtype {own}" if own in HALF_DTYPES else "--dtype bfloat16 --kv-cache-dtype bfloat16"
    return [
        f"a KV cache in {given} is not supported: codes replace it, and the rest stays in {own}; start with {remedy}"
    ]


def dtype_name(dtype: Any) -> str:
    """Torch's dtype as vLLM's flags write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _block_sizes(model: Any) -> tuple[int, ...]:
    """Tokens that a block of codes may have, given or chosen."""
    if model.is_hybrid:
        return STATE_BLOCK_SIZES
    return (64, *FITTING_BLOCK_SIZES) if are_mixed(model.hf_text_config) else SUPPORTED_BLOCK_SIZES


def _block_size(given: int, supported: tuple[int, ...]) -> list[str]:
    if given in supported:
        return []
    default = "" if supported == STATE_BLOCK_SIZES else " for 128"
    return [f"--block-size {given} is not supported; give {either(supported)}, or leave it out{default}"]


def _head_size(given: int | None) -> list[str]:
    if given in SUPPORTED_HEAD_SIZES:
        return []
    return [f"head size {given} is not supported, only {either(SUPPORTED_HEAD_SIZES)}; {OTHER_BACKEND}"]


def _mla() -> str:
    return f"multi-head latent attention (MLA) is not supported; {OTHER_BACKEND}"


def window_binds(sliding_window: int | None, max_model_len: int) -> bool:
    """Whether a sliding window ever hides a token: not where the longest sequence fits it."""
    return sliding_window is not None and sliding_window < max_model_len


def _sliding_window(sliding_window: int | None, max_model_len: int) -> list[str]:
    if not window_binds(sliding_window, max_model_len):
        return []
    reason = (
        f"layers with a sliding window of {sliding_window} tokens are not supported where a sequence may have "
        f"{max_model_len}; start with --disable-sliding-window, which limits sequences to the window, "
        f"or {OTHER_BACKEND}"
    )
    return [reason]


def _windows_off(text: Any) -> list[str]:
    """vLLM gives layers without their window the engine's backend, and no dictionary has them."""
    kinds = getattr(text, "layer_types", None) or []
    if not {"sliding_attention", "full_attention"} <= set(kinds) or getattr(text, "sliding_window", 0) is not None:
        return []
    reason = (
        "layers whose sliding windows are switched off (sliding_window is None) are not supported beside layers that "
        "never had one: a dictionary has these alone; start without --disable-sliding-window and without "
        "sliding_window in --hf-overrides"
    )
    return [reason]


def _window_of_layers(model: Any, cache: Any) -> int | None:
    """The window of the layers that are coded; None where these have none, as beside others that have one."""
    layer_types = getattr(model.hf_text_config, "layer_types", None) or []
    if "sliding_attention" not in layer_types:
        return cache.sliding_window
    return None if "full_attention" in layer_types else model.get_sliding_window()


def _encoder() -> str:
    return f"encoder and encoder-decoder attention is not supported, only decoders; {OTHER_BACKEND}"


def _dcp() -> str:
    return f"decode context parallelism is not supported: {DEALT_OUT}; leave --decode-context-parallel-size at 1"


def _asks_for_connector(cache: Any) -> str:
    """The flag that the user gave: vLLM makes a connector of its own for offloading."""
    return "--kv-transfer-config" if getattr(cache, "kv_offloading_size", None) is None else "--kv-offloading-size"


def _hybrid_manager_off(connector: Any, cache: Any) -> str:
    if connector is not None:
        return (
            f"KV connector {connector.kv_connector} turns the hybrid KV cache manager off, which the full-precision "
            f"tokens need; start without {_asks_for_connector(cache)}"
        )
    return (
        "the hybrid KV cache manager is off, which the full-precision tokens need; start without "
        "--disable-hybrid-kv-cache-manager"
    )
