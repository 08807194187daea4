"""The model that a dictionary is trained for: whether it can be captured from, known before its weights are loaded."""

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.errors import refusal
from vllm_lexico.train.own_text import read_tokenizer

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
TAKEN = (
    "decoders with transformers' common attention, such as Llama, Qwen, Mistral, Gemma, gpt-oss and Nemotron-H, and "
    "the language models of those that read images too"
)


@dataclass(frozen=True)
class ModelFacts:
    """What a model's configuration says.

    Args:
        fingerprint: what has to agree between model and dictionary.
        overridden: overrides, or how long sequences may be, made it another one than the model's own.
        longest: tokens of the longest context that is served, or None where nothing says it.
        revision: commit on the hub; None for a folder.
    """

    fingerprint: ModelFingerprint
    overridden: bool
    longest: int | None
    revision: str | None


def read_facts(model: str, overrides: str = "", max_model_len: int | None = None) -> ModelFacts:
    """Read and check a model's configuration.

    Args:
        model: hub id or folder.
        overrides: of its configuration, a JSON object, or "".
        max_model_len: tokens of the longest sequence that is served; None for the model's own longest.

    Raises:
        ValueError: transformers does not know it, its keys and values cannot be captured, or what is given does not fit
            it.
        OSError: it is not there.
    """
    config = read_config(model, overrides)
    _check_decoder(model, config)
    text = config.get_text_config()
    fingerprint = _fingerprint(model, text, max_model_len)
    _check_captured(model, config)
    overridden = bool(overrides) or max_model_len is not None
    overridden = overridden and _fingerprint(model, read_config(model).get_text_config()) != fingerprint
    longest = getattr(text, "max_position_embeddings", None)
    if longest is not None:
        longest = max(longest, _stretched_context(text))
    if max_model_len is not None:
        if longest is not None and max_model_len > longest:
            allowed = f"up to {longest}, the model's longest"
            raise ValueError(refusal("--max-model-len", max_model_len, allowed, "lower it, or leave it out"))
        longest = max_model_len
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
            f"the configuration of {model} cannot be read ({_first_sentence(error)}); allowed are {TAKEN}; "
            f"check its config.json, or take another model"
        ) from error
    if overrides:
        try:
            _override(config, json.loads(overrides))
        except Exception as error:  # transformers has kinds of its own for values that do not fit
            raise ValueError(
                refusal("--hf-overrides", overrides, f"what fits {model} ({_first_sentence(error)})", "correct it")
            ) from error
    return config


def check_folder(model: str, *, reads: bool) -> None:
    """Refuse a folder that has a model's configuration and lacks other files. What the hub has is not asked for.

    Args:
        model: hub id or folder.
        reads: whether text is given to read, which takes a tokenizer.

    Raises:
        ValueError: it has no weights, or no tokenizer where text is read.
    """
    folder = Path(model)
    if not folder.is_dir():
        return
    if not any(path.is_file() for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise ValueError(
            f"the folder {model} has config.json but no weights ({' or '.join(WEIGHTS)}); give the whole checkpoint"
        )
    if reads and read_tokenizer(model) is None:
        raise ValueError(
            f"the folder {model} has no tokenizer that transformers can read (as tokenizer.json), which the text of "
            f"--data needs; give the whole checkpoint"
        )


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


def _fingerprint(model: str, text: Any, max_model_len: int | None = None) -> ModelFingerprint:
    try:
        return ModelFingerprint.of(text, max_model_len)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"the configuration of {model} names no attention heads ({_first_sentence(error)}); allowed are models "
            f"whose every layer has ordinary attention; take another model"
        ) from error


def is_causal_lm(config: Any) -> bool:
    """Whether transformers has a causal language model of this configuration; else it may have one with images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def count_parameters(whole: Any) -> int | None:
    """Numbers in the weights of a model of this configuration, none of which is made; None where that is not known."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.initialization import no_init_weights

    for kind in (AutoModelForCausalLM, AutoModelForImageTextToText):
        try:
            with no_init_weights(), torch.device("meta"):
                built = kind.from_config(whole)
        except Exception:  # no such class, or one that wants what is not installed
            continue
        return sum(weight.numel() for weight in built.parameters())
    return None


def model_class(config: Any) -> Any:
    """The class of transformers that reads text with a model of this configuration; None where there is none.

    Of models that read images too, the language model alone where transformers has a class for it.
    """
    from transformers.models.auto import modeling_auto

    if is_causal_lm(config):
        return modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return images.get(type(config), None)


def _check_decoder(model: str, config: Any) -> None:
    """ValueError where the model has no decoder that reads text."""
    if model_class(config) is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{model} is of type {_kind(config)}, of which transformers has no decoder that reads text alone; allowed "
            f"are {TAKEN}; take another model"
        )


def _kind(config: Any) -> str:
    return getattr(config, "model_type", "") or type(config).__name__


def _check_captured(model: str, config: Any) -> None:
    """ValueError where the model's attention is not transformers' common one."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    decoder = MODEL_MAPPING.get(type(config.get_text_config()), model_class(config))
    if not _asks_for_attention(decoder):
        raise ValueError(
            f"{model} is of type {_kind(config)}, whose keys and values cannot be captured, as transformers gives it "
            f"attention code of its own; allowed are {TAKEN}; take another model"
        )


def _asks_for_attention(decoder: Any) -> bool:
    """Whether a model's code takes its attention from transformers' registry, where capture has its own."""
    try:
        return "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(inspect.getmodule(decoder) or decoder)
    except (OSError, TypeError):  # no source: it will say so when it is captured from
        return True


def _first_sentence(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words.split(". ")[0][:200].rstrip(".")
