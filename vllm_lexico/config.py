"""What a user can set: `--additional-config '{"lexico": {...}}'`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lexico_kernels.memory.layout import CODECS, MAX_SPARSITY

from vllm_lexico.errors import check_choice, check_whole_number, is_whole_number, refusal, shown

LEXICO = "lexico"  # the key of vLLM's `additional_config` that holds the settings
PREFIX_HITS = ("codes", "window", "same")
TRAIN = "train"  # the setting `dictionary` that makes a missing one
EXAMPLE = """'{"lexico": {"sparsity": 7}}'"""


@dataclass(frozen=True)
class Sparsity:
    """Atoms per vector, for keys and for values."""

    key: int
    value: int

    @staticmethod
    def of(given: Any) -> Sparsity:
        """Read a number or `{"key": number, "value": number}`."""
        parts = given if isinstance(given, Mapping) else {"key": given, "value": given}
        numbers = [value for value in parts.values() if is_whole_number(value, 1, MAX_SPARSITY)]
        if set(parts) != {"key", "value"} or len(numbers) < 2:
            allowed = f'a whole number from 1 to {MAX_SPARSITY}, or {{"key": number, "value": number}}'
            remedy = "with 128-dimensional heads 15 keeps 12.5 % of bf16's bytes and 7 keeps 6.25 %"
            raise ValueError(refusal("LEXICO setting sparsity", given, allowed, remedy))
        return Sparsity(parts["key"], parts["value"])


@dataclass(frozen=True)
class LexicoConfig:
    """The settings of the LEXICO backend; unknown keys and impossible values are refused.

    dictionary: a file or a Hugging Face id; None searches for one that was made for the model; "train" searches too,
        and trains one at the first start where there is none.
    sparsity: atoms per vector, the dial between memory and quality.
    uneven: [low, high], atoms per vector of KV heads that are asked little and of those that are asked much, as many of
        these as the bytes of `sparsity` allow; None gives all the same. The dictionary has to say which they are.
    window: newest tokens kept in full precision; at least 63 are, since so many may wait to be coded.
    sinks: first tokens kept in full precision, rounded up to whole tail pages.
    relative_error: stop choosing atoms once the residual's norm falls below this share of the vector's (0 never does);
        saves time, not memory: a code has the size that its sparsity gives it.
    prefix_hits: "codes" takes every prefix-cache hit and reads a missing window from codes; "window" takes a hit only
        where the full-precision window before it is cached too, which keeps one more block per request in full
        precision; "same" does so too, and has every token read codes beyond its block and the window before that, so
        that a request is answered alike cold, in any chunks, and after a hit.
    codec: "packed16", "paper" (int16 + fp8) or "exact" (the vectors themselves, for tests).
    coded_later: a step with prefill of up to so many tokens is coded when the next step begins, so that a prompt's
        first token does not wait for its codes and the step after pays; their keys and values are kept that long, in
        memory that the cache then lacks: as much as raw pages of so many tokens. 0 codes at once.
    """

    dictionary: str | None = None
    sparsity: Sparsity = Sparsity(15, 15)
    uneven: tuple[int, int] | None = None
    window: int = 128
    sinks: int = 16
    relative_error: float = 0.0
    prefix_hits: str = "codes"
    codec: str = "packed16"
    coded_later: int = 0

    def __post_init__(self) -> None:
        if self.dictionary is not None and not (isinstance(self.dictionary, str) and self.dictionary):
            allowed = f'a file, a Hugging Face id or "{TRAIN}"'
            remedy = "leave it out to have one searched for"
            raise ValueError(refusal("LEXICO setting dictionary", self.dictionary, allowed, remedy))
        self._check_uneven()
        check_whole_number("LEXICO setting window", self.window, 0, 65536, "it counts tokens, 128 by default")
        check_whole_number("LEXICO setting sinks", self.sinks, 0, 1024, "it counts tokens, 16 by default")
        error = self.relative_error
        if isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error < 1:
            allowed = "a number from 0 up to, not including, 1"
            raise ValueError(refusal("LEXICO setting relative_error", error, allowed, "0 switches it off"))
        check_choice("LEXICO setting prefix_hits", self.prefix_hits, PREFIX_HITS)
        check_choice("LEXICO setting codec", self.codec, CODECS)
        remedy = "it counts tokens of a step, and as many of raw cache are set aside; 8192 suits chunks of that size"
        check_whole_number("LEXICO setting coded_later", self.coded_later, 0, 1 << 20, remedy)
        if self.coded_later and self.prefix_hits == "same":
            raise ValueError(
                'with prefix_hits "same" a step reads the codes of its own tokens, so they cannot be made later; '
                "remove coded_later, or choose other prefix_hits"
            )

    def _check_uneven(self) -> None:
        pair, mean = self.uneven, self.sparsity
        if pair is None:
            return
        whole = isinstance(pair, tuple) and len(pair) == 2 and all(is_whole_number(x, 1, MAX_SPARSITY) for x in pair)
        if mean.key != mean.value or not whole or not pair[0] < mean.key < pair[1]:
            given = list(pair) if isinstance(pair, tuple) else pair
            allowed = (
                f"[low, high], whole numbers with low < {mean.key} < high <= {MAX_SPARSITY}, and one sparsity for both"
            )
            remedy = 'with "sparsity": 7, [3, 15] gives a third of the KV heads 15; leave it out to give all the same'
            raise ValueError(refusal("LEXICO setting uneven", given, allowed, remedy))

    @classmethod
    def from_additional_config(cls, additional_config: Any) -> LexicoConfig:
        """Read vLLM's `additional_config`.

        Raises:
            ValueError: a setting in the wrong place, an unknown one or a value out of range, in one sentence: what was
                given, what is allowed and what to do.
        """
        beside = additional_config if isinstance(additional_config, Mapping) else {}
        known = [field.name for field in fields(cls)]
        _check_place(beside, known)
        given = beside.get(LEXICO, {})
        if not isinstance(given, Mapping):
            raise ValueError(refusal(f'"{LEXICO}" in --additional-config', given, "an object of settings", EXAMPLE))
        for name in given:
            if name not in known:
                raise ValueError(_unknown(name, known))
        _check_exact(given)
        values = dict(given)
        if "sparsity" in values:
            values["sparsity"] = Sparsity.of(values["sparsity"])
        if isinstance(values.get("uneven"), list):
            values["uneven"] = tuple(values["uneven"])
        return cls(**values)


def without_backend(additional_config: Any) -> str | None:
    """What to say where another backend runs and vLLM's `additional_config` has settings for LEXICO; None if not."""
    if not isinstance(additional_config, Mapping) or LEXICO not in additional_config:
        return None
    return (
        f'--additional-config has settings under "{LEXICO}", but the attention backend is another; add '
        "--attention-backend LEXICO, or remove the settings"
    )


def _check_place(additional_config: Mapping[Any, Any], known: list[str]) -> None:
    """Refuse settings beside the key "lexico", and the key in other letters: vLLM would ignore them."""
    for name, value in additional_config.items():
        if not isinstance(name, str) or name == LEXICO:
            continue
        if name.casefold() == LEXICO:
            raise ValueError(f'--additional-config has the key {shown(name)}; write it as "{LEXICO}"')
        if name in known:
            raise ValueError(
                f'the setting {name} stands beside "{LEXICO}" in --additional-config; put it under that key: '
                f"{_placed(name, value)}"
            )


def _placed(name: str, value: Any) -> str:
    try:
        text = json.dumps({LEXICO: {name: value}})
    except (TypeError, ValueError, RecursionError):
        text = ""
    return f"'{text}'" if 0 < len(text) <= 100 and text.isascii() else f"""'{{"{LEXICO}": {{"{name}": ...}}}}'"""


def _unknown(name: Any, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1) if isinstance(name, str) and len(name) < 40 else []
    guess = f"did you mean {near[0]}?" if near else "correct or remove it"
    return f"unknown LEXICO setting {shown(name)} in --additional-config; known are {', '.join(known)}; {guess}"


def _check_exact(given: Mapping[Any, Any]) -> None:
    """Refuse what the exact codec would ignore."""
    if given.get("codec") != "exact":
        return
    names = "sparsity", "uneven", "dictionary", "relative_error"
    ignored = [name for name in names if given.get(name) is not None]
    if ignored:
        raise ValueError(
            "codec 'exact' stores the vectors themselves and takes no sparsity, dictionary or relative_error; remove "
            f"{' and '.join(ignored)}, or choose codec 'packed16'"
        )
