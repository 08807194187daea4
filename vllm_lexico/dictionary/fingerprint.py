"""What has to agree between a model and a dictionary."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from vllm_lexico.dictionary.coded_layers import coded_layers
from vllm_lexico.dictionary.names import check_words
from vllm_lexico.errors import check_whole_number, is_whole_number, refusal

MOST = 1 << 31  # more than any model has of anything
MOST_LAYERS = 1 << 16
LAYERS = "layers"  # in metadata: the coded ones, where not all are
FACTORS = "factors"  # of a rotary embedding that has two sets of them: "long" or "short"
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class ModelFingerprint:
    """What has to agree between a model and a dictionary before the codes can mean anything.

    Heads and rotary embedding are those of the layers that are coded.
    """

    model_type: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    rope: str  # canonical JSON of the rotary embedding's base and scaling
    some_layers: tuple[int, ...] = ()  # those that are coded, ascending; () where all are

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "hidden_size"):
            most = MOST_LAYERS if name == "num_layers" else MOST
            check_whole_number(f"the model's {name}", getattr(self, name), 1, most, "other models are not supported")
        check_words("the model's type", self.model_type)
        check_words("the model's rope", self.rope, blank=True)
        given, last = self.some_layers, self.num_layers - 1
        known = all(is_whole_number(layer, 0, last) for layer in given)
        if not known or list(given) != sorted(set(given)):
            allowed = f"ascending numbers from 0 to {last}"
            raise ValueError(refusal("the coded layers", list(given), allowed, "correct them"))
        if len(given) == self.num_layers:
            object.__setattr__(self, "some_layers", ())

    @staticmethod
    def of(config: Any, max_model_len: int | None = None) -> "ModelFingerprint":
        """Fingerprint of a transformers text config (4.x or 5.x, or the same as vLLM holds it).

        Args:
            config: of the language model.
            max_model_len: tokens of the longest sequence that is served, None for the model's own longest: where there
                are two sets of rotary factors, vLLM chooses by it.

        Raises:
            ValueError: nothing of the model is coded, see `coded_layers`, or the config has sizes of another kind, such
                as one per layer.
        """
        layers = coded_layers(config)
        own = _config_of_layer(config, layers[0])
        heads = own.num_attention_heads
        return ModelFingerprint(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(own, "num_key_value_heads", None) or heads,
            head_dim=getattr(own, "head_dim", None) or config.hidden_size // heads,
            hidden_size=config.hidden_size,
            rope=_canonical_rope(config, layers[0], max_model_len),
            some_layers=layers,
        )

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON can hold them; without the layers where all are coded."""
        values = asdict(self)
        del values["some_layers"]
        return values if self.all_layers else values | {LAYERS: list(self.some_layers)}

    @property
    def layers(self) -> tuple[int, ...]:
        """Those that are coded, ascending."""
        return self.some_layers or tuple(range(self.num_layers))

    @property
    def all_layers(self) -> bool:
        """Whether every layer is coded."""
        return not self.some_layers

    @property
    def short_context(self) -> int | None:
        """The longest sequence for which vLLM takes the short rotary factors, if the model has two sets and these."""
        settings, factors = _without_factors(self.rope)
        return int(settings[_ORIGINAL]) if factors == "short" else None

    def _coded(self) -> str:
        return "all" if self.all_layers else ranges(self.some_layers)

    def words(self) -> str:
        """The shape in words: "llama, 16 layers, 8 KV heads of 64"; with the layers that are coded if not all are."""
        coded = "" if self.all_layers else f" of which {self._coded()} are coded"
        return f"{self.model_type}, {self.num_layers} layers{coded}, {self.num_kv_heads} KV heads of {self.head_dim}"

    def differences(self, model: "ModelFingerprint") -> list[str]:
        """Fields in which this fingerprint (a dictionary's) is not that of `model`, in words; empty if none."""
        pairs = ((f.name, getattr(self, f.name), getattr(model, f.name)) for f in fields(self))
        differing = {name: (own, given) for name, own, given in pairs if own != given}
        if differing.pop("some_layers", None):
            differing["coded layers"] = self._coded(), model._coded()
        one, other = _without_factors(self.rope), _without_factors(model.rope)
        if "rope" in differing and one[0] == other[0]:
            del differing["rope"]
            differing["rotary factors"] = one[1], other[1]
        return [f"{name}: {own} in the dictionary, {given} in the model" for name, (own, given) in differing.items()]


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: "3, 7, 11 to 13"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [[f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run) for run in runs]
    return ", ".join(word for run in words for word in run)


def _config_of_layer(config: Any, layer: int) -> Any:
    """Where transformers keeps sizes that differ by layer (Gemma 4), that layer's own."""
    return config.per_layer_config[layer] if getattr(config, "is_heterogeneous", False) else config


def rotary_factors(parameters: dict[str, Any], config: Any, max_model_len: int | None = None) -> str | None:
    """Which of two sets of rotary factors vLLM takes, "long" or "short"; None where there is one.

    Args:
        parameters: of the rotary embedding.
        config: of the language model.
        max_model_len: tokens of the longest sequence that is served; None for the model's own longest.
    """
    if parameters.get("rope_type") != "longrope":
        return None
    original = parameters.get(_ORIGINAL) or getattr(config, _ORIGINAL, None)
    longest = max_model_len or getattr(config, "max_position_embeddings", None)
    return "long" if original is None or longest is None or longest > original else "short"


def _without_factors(rope: str) -> tuple[Any, str]:
    """(the rest of a rotary embedding's settings, its set of factors in words)."""
    try:
        settings = json.loads(rope)
        return settings, settings.pop(FACTORS, "not named")
    except (ValueError, AttributeError, TypeError, RecursionError):
        return rope, "not named"


def _canonical_rope(config: Any, layer: int, max_model_len: int | None) -> str:
    """Rotary settings of a layer as JSON that is equal for equal rotations, whichever transformers wrote the config.

    transformers 5 keeps everything in `rope_parameters` (nested by layer type in some models), 4 keeps `rope_theta` and
    `rope_scaling`; either may leave a default out, name it `type`, or spell 10000 as an integer.
    """
    parameters = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = getattr(config, "rope_theta", None)
    partial = getattr(config, "partial_rotary_factor", None)

    def canonical(settings: dict[str, Any]) -> dict[str, Any]:
        known = {name: value for name, value in settings.items() if value is not None}
        legacy = known.pop("type", None)
        known.setdefault("rope_type", legacy or "default")
        if theta is not None:
            known.setdefault("rope_theta", theta)
        if partial is not None:
            known.setdefault("partial_rotary_factor", partial)
        if known.get("partial_rotary_factor") == 1.0:
            known.pop("partial_rotary_factor")
        if factors := rotary_factors(known, config, max_model_len):
            known[FACTORS] = factors
            if original := getattr(config, _ORIGINAL, None):
                known.setdefault(_ORIGINAL, original)
        return {name: _as_float(value) for name, value in known.items()}

    if parameters and all(isinstance(value, dict) or value is None for value in parameters.values()):
        types = getattr(config, "layer_types", None) or []
        own = parameters.get(types[layer]) if layer < len(types) else None
        if own is None:
            rope = {name: canonical(value) for name, value in parameters.items() if value is not None}
        else:
            rope = canonical(own)
    else:
        rope = canonical(parameters)
    return json.dumps(rope, sort_keys=True)


def _as_float(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_float(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
