"""What a model's configuration says about its cache: which layers are coded, and what the others keep."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from vllm_lexico.check.states import state_bytes
from vllm_lexico.dictionary.coded_layers import FULL, WINDOWED, WITH_STATE, coded_layers, layer_kinds, state_layers
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.errors import refusal
from vllm_lexico.train.model import read_config

UNKNOWN_LENGTH_TOKENS = 2048  # what vLLM takes where a configuration names no longest context
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length", "max_seq_length")
# Kinds of rotary embedding whose longest context is what the configuration names, stretched already.
STRETCHED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
WITHOUT_CACHE = ("mlp", "moe", "dense", "sparse")
CHUNKED = "chunked_attention"
ELEMENT_BYTES = 2  # vLLM serves float32 checkpoints in 16 bits


@dataclass(frozen=True)
class Heads:
    """KV heads of a layer. number: in the whole model. size: numbers in a vector."""

    number: int
    size: int

    def on_each(self, gpus: int) -> int:
        """KV heads that each of so many GPUs holds; they hold the same ones where there are more GPUs than heads."""
        return max(self.number // gpus, 1)


@dataclass(frozen=True)
class OtherLayers:
    """Layers of one kind that are not coded, or that keep a state beside what is coded.

    kind: in words.
    layers: their indices.
    window: tokens that they look back at most, themselves counted; None for those that keep no tokens.
    chunked: whether the window is a chunk that starts anew.
    keeps_state: whether a request has a state in each of them.
    heads: of those that keep tokens.
    """

    kind: str
    layers: tuple[int, ...]
    window: int | None = None
    chunked: bool = False
    keeps_state: bool = False
    heads: Heads | None = None


@dataclass(frozen=True)
class ModelShape:
    """A model as its configuration describes it.

    text: configuration of its language model, of transformers. whole: of all of it.
    coded: indices of the layers that LEXICO codes.
    window: tokens that these look back, where they all have a window.
    longest: tokens of the longest context; usual: what vLLM takes where none is asked for.
    """

    name: str
    whole: Any
    text: Any
    num_layers: int
    coded: tuple[int, ...]
    heads: Heads
    window: int | None
    others: tuple[OtherLayers, ...]
    longest: int
    usual: int

    def fingerprint(self, max_model_len: int) -> ModelFingerprint:
        """What a dictionary for requests of so many tokens has to agree with."""
        return ModelFingerprint.of(self.text, max_model_len)

    def state_bytes(self, gpus: int) -> int | None:
        """Bytes of a request's state in one layer on each GPU; None where the kind of state is not known."""
        return state_bytes(self.text, gpus)

    @property
    def keeps_states(self) -> bool:
        """Whether some layers keep a state per request."""
        return bool(self.state_layers)

    @property
    def state_layers(self) -> tuple[int, ...]:
        """Indices of the layers that do."""
        return state_layers(self.text)

    def binding_window(self, max_model_len: int) -> int | None:
        """The window of the coded layers where it hides a token."""
        return self.window if self.window is not None and self.window < max_model_len else None


class NothingCodedError(ValueError):
    """No layer of a model would be coded; says why."""


def read_shape(name: str, folder: str, overrides: str = "") -> ModelShape:
    """Read and understand a configuration.

    Args:
        name: of the model, as the user gave it.
        folder: that has its config.json.
        overrides: of the configuration, as vLLM's --hf-overrides takes them.

    Raises:
        NothingCodedError: it describes no layer that would be coded.
        ValueError: transformers is not there, or the configuration cannot be read, or describes no decoder with
            attention in layers of one shape.
    """
    if find_spec("transformers") is None:
        raise ValueError(
            "transformers, which reads configurations, is not installed; vLLM brings it: check where vLLM is, or run "
            "`pip install transformers`"
        )
    whole = read_config(folder, overrides)
    text = whole.get_text_config()
    try:
        coded = coded_layers(text)
    except ValueError as error:
        raise NothingCodedError(str(error)) from error
    kinds = layer_kinds(text)
    longest, usual = contexts(text)
    try:
        ModelFingerprint.of(text)
        heads = heads_of(text, coded[0])
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"the configuration of {name} names no attention heads ({error}); LEXICO codes decoders whose every "
            "attention layer has the same heads; choose another model"
        ) from error
    window = _window(text) if kinds[coded[0]] in WINDOWED or set(kinds) == {"full_attention"} else None
    return ModelShape(
        name=name,
        whole=whole,
        text=text,
        num_layers=len(kinds),
        coded=coded,
        heads=heads,
        window=window,
        others=tuple(_others(text, kinds, coded)),
        longest=longest,
        usual=usual,
    )


def _others(text: Any, kinds: list[str], coded: tuple[int, ...]) -> Iterator[OtherLayers]:
    """The layers that are not coded, by kind in the order of their first."""
    left = [index for index in range(len(kinds)) if index not in coded]
    shared = getattr(text, "num_kv_shared_layers", None) or 0
    readers = tuple(index for index in left if index >= len(kinds) - shared) if shared else ()
    if readers:
        yield OtherLayers("that read the cache of other layers", readers)
    for kind in dict.fromkeys(kinds[index] for index in left if index not in readers):
        layers = tuple(index for index in left if kinds[index] == kind and index not in readers)
        if kind in WINDOWED:
            window = _window(text)
            yield OtherLayers(f"with a window of {window:,} tokens", layers, window, heads=heads_of(text, layers[0]))
        elif kind == CHUNKED:
            chunk = text.attention_chunk_size
            yield OtherLayers(
                f"with attention in chunks of {chunk:,} tokens", layers, chunk, True, heads=heads_of(text, layers[0])
            )
        elif kind in WITHOUT_CACHE:
            yield OtherLayers("without attention", layers)
        elif kind in WITH_STATE:
            words = {"conv": "short convolutions", "linear_attention": "linear attention or Mamba"}
            yield OtherLayers(f"with {words.get(kind, 'Mamba')}", layers, keeps_state=True)
    if both := tuple(index for index, kind in enumerate(kinds) if kind in WITH_STATE & (FULL | WINDOWED)):
        yield OtherLayers("have a state beside attention", both, keeps_state=True)  # coded ones, as in Falcon-H1


def _window(text: Any) -> int | None:
    return getattr(text, "sliding_window", None) or getattr(text, "window_size", None)


def heads_of(text: Any, layer: int) -> Heads:
    """KV heads of a layer; AttributeError or TypeError where a configuration names none."""
    if getattr(text, "is_heterogeneous", False):  # Gemma 4: transformers has a configuration for each layer
        text = text.per_layer_config[layer]
    query_heads = text.num_attention_heads
    number = getattr(text, "num_key_value_heads", None)
    if getattr(text, "model_type", "") == "falcon":
        one = text.multi_query and not text.new_decoder_architecture
        number = 1 if one else getattr(text, "num_kv_heads", None)
    size = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    return Heads(int(number or query_heads), int(size))


def contexts(text: Any) -> tuple[int, int]:
    """Tokens of the longest context and of the one that vLLM takes by itself, which a long-rope model has shorter."""
    named = [value for name in LENGTHS if isinstance(value := getattr(text, name, None), int)]
    longest = min(named, default=UNKNOWN_LENGTH_TOKENS)
    ropes = list(_ropes(text))
    if "gemma3" not in getattr(text, "model_type", ""):
        factors = [rope.get("factor") for rope in ropes if rope.get("rope_type") not in STRETCHED]
        longest = int(longest * next((factor for factor in factors if factor), 1))
    for rope in ropes:  # what overrides stretch
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if rope.get("rope_type") == "yarn" and original and factor:
            longest = max(longest, int(original * factor))
    original = getattr(text, "original_max_position_embeddings", None)
    is_long = any(rope.get("rope_type") == "longrope" for rope in ropes)
    return longest, int(original) if is_long and original else longest


def _ropes(text: Any) -> Iterator[dict[str, Any]]:
    given = getattr(text, "rope_parameters", None)
    if isinstance(given, dict) and given:
        nested = all(isinstance(value, dict) or value is None for value in given.values())
        yield from (value for value in (given.values() if nested else [given]) if value)


def bytes_per_parameter(whole: Any) -> float:
    """Bytes of a stored weight on average, as the configuration's quantization says it."""
    scheme = getattr(whole, "quantization_config", None) or {}
    scheme = scheme if isinstance(scheme, dict) else scheme.to_dict()
    if bits := scheme.get("bits") or scheme.get("w_bit"):
        return bits / 8 * 1.06  # a scale and a zero point for every 64 or 128 weights
    found = re.search(r"(fp8|int8|mxfp4|fp4|int4)", str(scheme).lower())
    return {"fp8": 1.0, "int8": 1.0, "mxfp4": 0.53, "fp4": 0.56, "int4": 0.53}[found[1]] if found else 2.0


def weights_per_token(text: Any) -> float:
    """Weights of the layers that a token is multiplied with, roughly: attention, and the experts that it meets."""
    hidden = text.hidden_size
    own = heads_of(text, 0)
    size = own.size
    attention = hidden * size * 2 * (text.num_attention_heads + own.number)
    expert = getattr(text, "moe_intermediate_size", None)
    experts = _first(text, "num_experts_per_tok", "top_k_experts", "num_experts_per_token")
    wide = _first(text, "intermediate_size", "ffn_hidden_size", "n_inner") or 4 * hidden
    wide = max(wide) if isinstance(wide, list) else wide
    if experts:
        wide = experts * (expert or wide) + (_first(text, "shared_expert_intermediate_size") or 0)
    return float(text.num_hidden_layers * (attention + 3 * hidden * wide))


def _first(text: Any, *names: str) -> Any:
    return next((value for name in names if (value := getattr(text, name, None))), None)


def check_length(given: int | None, shape: ModelShape) -> int:
    """Tokens that a request may have; ValueError where the model's context is shorter."""
    if given is None:
        return shape.usual
    if not 1 <= given <= shape.longest:
        remedy = "give fewer tokens, or stretch the context by --hf-overrides"
        raise ValueError(refusal("--max-model-len", given, f"1 to {shape.longest:,}, the model's context", remedy))
    return given
