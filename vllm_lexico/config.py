"""What a user can set: `--additional-config '{"lexico": {...}}'`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lexico_kernels.memory.layout import CODECS, MAX_SPARSITY

PREFIX_HITS = ("codes", "window")
TRAIN = "train"  # the setting `dictionary` that makes a missing one


@dataclass(frozen=True)
class Sparsity:
    """Atoms a vector, for keys and for values."""

    key: int
    value: int

    @staticmethod
    def of(given: Any) -> Sparsity:
        """Read a number or `{"key": number, "value": number}`."""
        parts = given if isinstance(given, Mapping) else {"key": given, "value": given}
        allowed = f'a whole number from 1 to {MAX_SPARSITY}, or {{"key": number, "value": number}}'
        numbers = [value for value in parts.values() if _is_int(value) and 1 <= value <= MAX_SPARSITY]
        if set(parts) != {"key", "value"} or len(numbers) < 2:
            raise ValueError(
                _refusal("sparsity", given, allowed, "15 keeps 12.5 % of bf16 at head size 128, 7 keeps 6.25 %")
            )
        return Sparsity(parts["key"], parts["value"])


@dataclass(frozen=True)
class LexicoConfig:
    """The settings of the LEXICO backend; unknown keys and impossible values are refused.

    dictionary: a file or a Hugging Face id; None searches for one that was made for the model; "train" searches too,
        and trains one at the first start where there is none.
    sparsity: atoms a vector, the dial between memory and quality.
    window: newest tokens kept in full precision; at least 63 are, since so many may wait to be coded.
    sinks: first tokens kept in full precision, rounded up to whole tail pages.
    relative_error: stop choosing atoms once the residual's norm falls below this share of the vector's (0 never does);
        saves time, not memory: a code has the size that its sparsity gives it.
    prefix_hits: "codes" takes every prefix-cache hit and reads a missing window from codes; "window" takes a hit only
        where the full-precision window before it is cached too, which keeps one more block a request in full precision.
    codec: "packed16", "paper" (int16 + fp8) or "exact" (the vectors themselves, for tests).
    """

    dictionary: str | None = None
    sparsity: Sparsity = Sparsity(15, 15)
    window: int = 128
    sinks: int = 16
    relative_error: float = 0.0
    prefix_hits: str = "codes"
    codec: str = "packed16"

    def __post_init__(self) -> None:
        if self.dictionary is not None and not (isinstance(self.dictionary, str) and self.dictionary):
            allowed = f'a file, a Hugging Face id or "{TRAIN}"'
            raise ValueError(_refusal("dictionary", self.dictionary, allowed, "leave it out"))
        _check_int("window", self.window, 0, 65536)
        _check_int("sinks", self.sinks, 0, 1024)
        error = self.relative_error
        if isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error < 1:
            raise ValueError(_refusal("relative_error", error, "a number from 0 up to, not including, 1", "0 is off"))
        _check_choice("prefix_hits", self.prefix_hits, PREFIX_HITS)
        _check_choice("codec", self.codec, CODECS)
        if self.codec == "exact" and (self.dictionary is not None or error > 0):
            raise ValueError(
                "codec 'exact' stores the vectors themselves, so it takes neither a dictionary nor a relative_error; "
                "remove them, or choose codec 'packed16'"
            )

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> LexicoConfig:
        """Read vLLM's `additional_config`.

        Raises:
            ValueError: an unknown key or a value out of range, with what was given, what is allowed and what to do.
        """
        given = additional_config.get("lexico", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise ValueError(
                _refusal("lexico", given, "an object of settings", """e.g. '{"lexico": {"sparsity": 7}}'""")
            )
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(
                f"unknown LEXICO setting {', '.join(map(repr, unknown))}; known are {', '.join(known)}. "
                "Correct or remove it in --additional-config"
            )
        values = dict(given)
        if "sparsity" in values:
            values["sparsity"] = Sparsity.of(values["sparsity"])
        return cls(**values)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refusal(name: str, given: Any, allowed: str, remedy: str) -> str:
    return f"LEXICO setting {name} was given as {given!r}; allowed is {allowed}. Hint: {remedy}"


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if not _is_int(value) or not low <= value <= high:
        raise ValueError(_refusal(name, value, f"a whole number from {low} to {high}", "it counts tokens"))


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(_refusal(name, value, " or ".join(map(repr, choices)), f"the default is {choices[0]!r}"))
