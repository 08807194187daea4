"""Whether LEXICO serves a model: the refusals of `serve.refusals`, asked about what a configuration shows."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from vllm_lexico import NAME
from vllm_lexico.check.model import ModelShape
from vllm_lexico.serve import refusals

# Models whose images are seen in both directions within a prompt, as vLLM lists them; text alone is served.
SEES_IMAGES_BOTH_WAYS = ("bagel", "gemma3", "molmo2", "paligemma")
TEXT_ALONE = ("--limit-mm-per-prompt", '{"image": 0}')
DTYPE = "bfloat16"
ENCODERS = ("bert", "electra")  # in the names of types whose every token sees all others
ALIBI = ("bloom", "mpt")  # models that have no other positions


class _Plain(SimpleNamespace):
    """Part of what vLLM calls a configuration; what is not named here is None, as where a user sets nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def reasons_against(shape: ModelShape, max_model_len: int) -> list[str]:
    """Why LEXICO does not serve a model with the settings that `vllm serve` has by itself; empty where it does.

    Args:
        shape: of the model.
        max_model_len: tokens that a request may have.
    """
    stand_in = vllm_config_of(shape, max_model_len)
    reasons = refusals.engine_refusals(stand_in)
    if not stand_in.model_config.use_mla:  # whose head size is another thing
        reasons += refusals.model_refusals(stand_in)
    return list(dict.fromkeys([*reasons, *_layer_reasons(shape, max_model_len)]))


def _layer_reasons(shape: ModelShape, max_model_len: int) -> Iterator[str]:
    text = shape.text
    attn_type = "encoder_only" if any(name in text.model_type for name in ENCODERS) else "decoder"
    use_mla = _uses_mla(text)
    yield from refusals.selector_refusals(
        {"head_size": shape.heads.size, "use_mla": use_mla, "attn_type": attn_type, "dtype": DTYPE}
    )
    yield from refusals.layer_refusals(
        max_model_len=max_model_len,
        alibi_slopes=True if getattr(text, "alibi", False) or text.model_type in ALIBI else None,
        sliding_window=shape.binding_window(max_model_len),
        attn_type=attn_type,
        kv_sharing_target=_shared(text),
    )
    value_size = getattr(text, "v_head_dim", None)
    if value_size and not use_mla:
        layer = f"model.layers.{shape.coded[0]}.self_attn.attn"
        yield from refusals.value_size_refusals(shape.heads.size, value_size, layer)


def text_alone(shape: ModelShape) -> bool:
    """Whether a model is served for text alone, with the flag TEXT_ALONE."""
    return getattr(shape.whole, "model_type", "") in SEES_IMAGES_BOTH_WAYS


def _uses_mla(text: Any) -> bool:
    return bool(getattr(text, "kv_lora_rank", None))


def _shared(text: Any) -> str | None:
    """The layer whose cache others read, in a model that has such."""
    shared = getattr(text, "num_kv_shared_layers", None)
    return f"model.layers.{text.num_hidden_layers - shared - 1}" if shared else None


def vllm_config_of(shape: ModelShape, max_model_len: int) -> Any:
    """What `serve.refusals` reads of vLLM's configuration, for a model with nothing else set.

    Args:
        shape: of the model.
        max_model_len: tokens that a request may have.
    """
    text, own_window = shape.text, shape.binding_window(max_model_len)
    some_left = len(shape.coded) < shape.num_layers
    model = _Plain(
        dtype=DTYPE,
        use_mla=_uses_mla(text),
        is_hybrid=shape.keeps_states,
        is_encoder_decoder=bool(getattr(shape.whole, "is_encoder_decoder", False)),
        is_mm_prefix_lm=False,  # the command says that it serves text alone
        hf_config=shape.whole,
        hf_text_config=text,
        max_model_len=max_model_len,
        get_head_size=lambda: shape.heads.size,
        get_sliding_window=lambda: shape.window,
    )
    return _Plain(
        model_config=model,
        cache_config=_Plain(cache_dtype="auto", sliding_window=None if some_left else own_window),
        parallel_config=_Plain(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        scheduler_config=_Plain(disable_hybrid_kv_cache_manager=False),
        attention_config=_Plain(
            backend=SimpleNamespace(name=NAME), backend_per_kind={"sliding_window": None} if some_left else {}
        ),
    )
