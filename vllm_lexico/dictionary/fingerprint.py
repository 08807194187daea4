"""What has to agree between a model and a dictionary."""

import json
from dataclasses import dataclass, fields
from typing import Any

from vllm_lexico.dictionary.names import check_words
from vllm_lexico.errors import check_whole_number

MOST = 1 << 31  # more than any model has of anything


@dataclass(frozen=True)
class ModelFingerprint:
    """What has to agree between a model and a dictionary before the codes can mean anything."""

    model_type: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    rope: str  # canonical JSON of the rotary embedding's base and scaling

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "hidden_size"):
            check_whole_number(f"the model's {name}", getattr(self, name), 1, MOST, "other models are not supported")
        check_words("the model's type", self.model_type)
        check_words("the model's rope", self.rope, blank=True)

    @staticmethod
    def of(config: Any) -> "ModelFingerprint":
        """Fingerprint of a transformers text config (4.x or 5.x, or the same as vLLM holds it).

        Raises:
            ValueError: the config has sizes of another kind, such as one per layer.
        """
        heads = config.num_attention_heads
        return ModelFingerprint(
            model_type=config.model_type,
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            hidden_size=config.hidden_size,
            rope=_canonical_rope(config),
        )

    def differences(self, model: "ModelFingerprint") -> list[str]:
        """Fields in which this fingerprint (a dictionary's) is not that of `model`, in words; empty if none."""
        pairs = ((f.name, getattr(self, f.name), getattr(model, f.name)) for f in fields(self))
        return [f"{name}: {own} in the dictionary, {given} in the model" for name, own, given in pairs if own != given]


def _canonical_rope(config: Any) -> str:
    """Rotary settings as JSON that is equal for equal rotations, whichever transformers wrote the config.

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
        return {name: _as_float(value) for name, value in known.items()}

    if parameters and all(isinstance(value, dict) or value is None for value in parameters.values()):
        rope = {name: canonical(value) for name, value in parameters.items() if value is not None}
    else:
        rope = canonical(parameters)
    return json.dumps(rope, sort_keys=True)


def _as_float(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_as_float(item) for item in value]
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
