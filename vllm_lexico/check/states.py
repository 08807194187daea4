"""Bytes of the state that a layer with Mamba, linear attention or a convolution keeps per request, as vLLM sizes it."""

from __future__ import annotations

from typing import Any

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def state_bytes(text: Any, gpus: int = 1) -> int | None:
    """Bytes of one layer's state on each GPU, in a model served in 16 bits; None where the kind is not known.

    Args:
        text: configuration of transformers of a language model.
        gpus: that share the layers' heads.
    """
    for read in (_gated_delta_net, _mamba2, _mamba1, _short_convolution, _lightning):
        found = read(text, gpus)
        if found is not None:
            return found
    return None


def _gated_delta_net(text: Any, gpus: int) -> int | None:
    """Qwen3-Next, Qwen3.5: a convolution's last inputs, and a matrix per value head."""
    if not (key_heads := _value(text, "linear_num_key_heads")):
        return None
    value_heads, key_dim, value_dim = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
    channels = (2 * key_dim * key_heads + value_dim * value_heads) // gpus
    matrix = value_heads // gpus * value_dim * key_dim * _element(text, "mamba_ssm_dtype")
    return channels * (text.linear_conv_kernel_dim - 1) * 2 + matrix


def _mamba2(text: Any, gpus: int) -> int | None:
    """Nemotron-H; Bamba, Granite 4, Falcon-H1."""
    if heads := _value(text, "mamba_num_heads"):
        inner, head_dim, states = heads * text.mamba_head_dim, text.mamba_head_dim, text.ssm_state_size
        groups, kernel, element = text.n_groups, text.conv_kernel, _element(text, "mamba_ssm_cache_dtype", "float32")
    elif heads := _value(text, "mamba_n_heads"):
        head_dim, states = text.mamba_d_head, text.mamba_d_state
        inner = _value(text, "mamba_d_ssm") or text.mamba_expand * text.hidden_size
        groups, kernel, element = text.mamba_n_groups, text.mamba_d_conv, 2
    else:
        return None
    if groups % gpus:
        groups = gpus
    return (inner + 2 * groups * states) // gpus * (kernel - 1) * 2 + heads // gpus * head_dim * states * element


def _mamba1(text: Any, gpus: int) -> int | None:
    """Jamba."""
    if not _value(text, "mamba_dt_rank"):
        return None
    inner = text.mamba_expand * text.hidden_size // gpus
    return inner * (text.mamba_d_conv - 1) * 2 + inner * text.mamba_d_state * 2


def _short_convolution(text: Any, gpus: int) -> int | None:
    """LFM2."""
    if not (kernel := _value(text, "conv_L_cache")):
        return None
    return (_value(text, "conv_dim") or text.hidden_size) // gpus * (kernel - 1) * 2


def _lightning(text: Any, gpus: int) -> int | None:
    """MiniMax."""
    if _value(text, "linear_attn_alpha_factor") is None:
        return None
    head_dim = _value(text, "head_dim") or text.hidden_size // text.num_attention_heads
    return text.num_attention_heads // gpus * head_dim**2 * 2


def _element(text: Any, name: str, otherwise: str = "bfloat16") -> int:
    return ELEMENT_BYTES.get(str(_value(text, name) or otherwise).removeprefix("torch."), 2)


def _value(text: Any, name: str) -> Any:
    return getattr(text, name, None)
