"""The model that a dictionary is trained for: whether it can be captured from, known before its weights are loaded."""

import json
from dataclasses import dataclass
from typing import Any

from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.errors import refusal


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration says.

    Args:
        fingerprint: what has to agree between model and dictionary.
        overridden: overrides made it another one than the model's own.
        longest: tokens of its longest context, or None where it says nothing.
        revision: commit on the hub; None for a folder.
    """

    fingerprint: ModelFingerprint
    overridden: bool
    longest: int | None
    revision: str | None


def read_facts(model: str, overrides: str = "") -> ModelFacts:
    """Read and check a model's configuration.

    Args:
        model: hub id or folder.
        overrides: of its configuration, a JSON object, or "".

    Raises:
        ValueError: transformers does not know it, its keys and values cannot be captured, or the overrides do not fit.
        OSError: it is not there.
    """
    config = read_config(model, overrides)
    _check_captured(model, config)
    text = config.get_text_config()
    fingerprint = _fingerprint(model, text)
    overridden = bool(overrides) and _fingerprint(model, read_config(model).get_text_config()) != fingerprint
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None:
        longest = max(longest, _stretched_context(text))
    return ModelFacts(fingerprint, overridden, longest, getattr(config, "_commit_hash", None))


def read_config(model: str, overrides: str = "") -> Any:
    """A model's configuration of transformers, changed as vLLM's --hf-overrides changes it; see `read_facts`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except OSError:
        raise
    except Exception as error:  # of many kinds; a ValueError's text lists every type that transformers has
        raise ValueError(
            f"the configuration of {model} cannot be read ({_first_sentence(error)}); allowed are causal language "
            f"models of transformers; check its config.json, or take another model"
        ) from error
    if overrides:
        try:
            _override(config, json.loads(overrides))
        except Exception as error:  # transformers has kinds of its own for values that do not fit
            raise ValueError(
                refusal("--hf-overrides", overrides, f"what fits {model} ({_first_sentence(error)})", "correct it")
            ) from error
    return config


def check_overrides(given: str) -> None:
    """Refuse what is no JSON object.

    Raises:
        ValueError: in one sentence.
    """
    try:
        is_object = isinstance(json.loads(given), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        example = """'{"rope_parameters": {"rope_type": "yarn", ...}}'"""
        raise ValueError(refusal("--hf-overrides", given, f"a JSON object, as in {example}", "correct it"))


def _override(config: Any, changes: dict[str, Any]) -> None:
    """Set values of a configuration, those of a nested one within it, and bring its rotary embedding into one form."""
    from transformers import PreTrainedConfig

    for name, value in changes.items():
        nested = getattr(config, name, None)
        if isinstance(nested, PreTrainedConfig) and isinstance(value, dict):
            _override(nested, value)
        else:
            setattr(config, name, value)
    config.standardize_rope_params()
    config.validate_rope()


def _stretched_context(config: Any) -> int:
    """Tokens that a rotary embedding is stretched to (YaRN and its like); 0 where it is not."""
    rope = getattr(config, "rope_parameters", None) or {}
    try:
        return int(rope["factor"] * rope["original_max_position_embeddings"])
    except (KeyError, TypeError):
        return 0


def _fingerprint(model: str, text: Any) -> ModelFingerprint:
    try:
        return ModelFingerprint.of(text)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"the configuration of {model} names no attention heads ({_first_sentence(error)}); allowed are models "
            f"whose every layer has ordinary attention; take another model"
        ) from error


def _check_captured(model: str, config: Any) -> None:
    """ValueError where the model is no causal language model, or its attention is not transformers' common one."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = getattr(config, "model_type", "") or type(config).__name__
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"{model} is of type {kind}, which transformers has no causal language model for; allowed are models of "
            f"text alone; take another model"
        )
    if not MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].is_backend_compatible():
        raise ValueError(
            f"{model} is of type {kind}, whose keys and values cannot be captured, as transformers gives it attention "
            f"code of its own; allowed are models that use its common attention interface; take another model"
        )


def _first_sentence(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words.split(". ")[0][:200].rstrip(".")
