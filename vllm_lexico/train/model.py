"""The model that a dictionary is trained for: whether it can be captured from, known before its weights are loaded."""

from dataclasses import dataclass
from typing import Any

from vllm_lexico.dictionary.fingerprint import ModelFingerprint


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration says.

    Args:
        fingerprint: what has to agree between model and dictionary.
        longest: tokens of its longest context, or None where it says nothing.
        revision: commit on the hub; None for a folder.
    """

    fingerprint: ModelFingerprint
    longest: int | None
    revision: str | None


def read_facts(model: str) -> ModelFacts:
    """Read and check a model's configuration.

    Args:
        model: hub id or folder.

    Raises:
        ValueError: transformers does not know it, or its keys and values cannot be captured.
        OSError: it is not there.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model)
    except ValueError as error:  # its text lists every type that transformers has
        raise ValueError(
            f"the configuration of {model} cannot be read ({_first_sentence(error)}); allowed are causal language "
            f"models of transformers; check its config.json, or take another model"
        ) from error
    _check_captured(model, config)
    text = config.get_text_config()
    try:
        fingerprint = ModelFingerprint.of(text)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"the configuration of {model} names no attention heads ({_first_sentence(error)}); allowed are models "
            f"whose every layer has ordinary attention; take another model"
        ) from error
    longest = getattr(text, "max_position_embeddings", None)
    return ModelFacts(fingerprint, longest, getattr(config, "_commit_hash", None))


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
