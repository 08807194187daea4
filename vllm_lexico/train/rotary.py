"""Rotary embeddings as vLLM turns keys: with one set of factors, where transformers takes them by the text's length."""

import math
from typing import Any

import torch

from vllm_lexico.dictionary.fingerprint import rotary_factors

# Families whose heads turn neighbouring numbers together in transformers. vLLM orders the weights of their queries and
# keys by halves as it loads them, in layers that turn nothing too (`permute_qk_weight_for_rotary`).
NEIGHBOURS_TURN = ("llama4_text",)


def as_vllm_orders(vectors: torch.Tensor, model_type: str) -> torch.Tensor:
    """The numbers of queries or keys in vLLM's order.

    Args:
        vectors: [..., D] of transformers.
        model_type: of the text model.
    """
    if model_type not in NEIGHBOURS_TURN:
        return vectors
    return torch.cat((vectors[..., 0::2], vectors[..., 1::2]), -1)


def settle_rotary(model: Any, max_model_len: int | None = None) -> None:
    """Give the rotary embeddings of a model of transformers, in place, the factors that vLLM takes.

    A "longrope" has one set for texts within the original context and one for longer ones; vLLM decides by the longest
    sequence that it is to serve (`Phi3LongRoPEScaledRotaryEmbedding`). A "dynamic" one has a base that grows with the
    text in transformers; vLLM's is the same for all (`DynamicNTKScalingRotaryEmbedding`).

    Args:
        model: with rotary embeddings of transformers' `modeling_rope_utils`, or none.
        max_model_len: tokens of the longest sequence that is served; None for the model's own longest.
    """
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            for layer_type in kinds:
                if kinds[layer_type] in ("longrope", "dynamic"):
                    parameters = module.config.rope_parameters[layer_type]
                    _settle(module, parameters, f"{layer_type}_", max_model_len)
                    kinds[layer_type] = "default"  # never changed by the length of a text
        elif kinds in ("longrope", "dynamic"):
            _settle(module, module.config.rope_parameters, "", max_model_len)
            module.rope_type = "default"


def _settle(module: Any, parameters: dict[str, Any], prefix: str, max_model_len: int | None) -> None:
    """One embedding; prefix: of its attributes' names, for modules that have one by layer type."""
    config, present = module.config, getattr(module, f"{prefix}inv_freq")
    dim, base = 2 * len(present), float(parameters["rope_theta"])
    factors = rotary_factors(parameters, config, max_model_len)
    scaling = 1.0
    if factors is not None:
        divisors = torch.tensor(parameters[f"{factors}_factor"], dtype=torch.float32)
        scaling = parameters.get(f"{factors}_mscale") or _longrope_scaling(parameters, config)
    elif "alpha" in parameters:  # of a base that transformers, too, computes once
        return
    else:
        longest, factor = config.max_position_embeddings, parameters["factor"]
        trained = parameters.get("max_trained_positions") or longest
        divisors = torch.ones(dim // 2)
        base *= (factor * longest / trained - (factor - 1)) ** (dim / (dim - 2))
    frequencies = 1.0 / (divisors * base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    module.register_buffer(f"{prefix}inv_freq", frequencies.to(present.device), persistent=False)
    setattr(module, f"{prefix}attention_scaling", scaling)


def _longrope_scaling(parameters: dict[str, Any], config: Any) -> float:
    """What vLLM multiplies cosines and sines by where the configuration does not say."""
    original = parameters["original_max_position_embeddings"]
    stretch = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
