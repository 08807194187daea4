"""Sentences for a user's mistakes: what was given, what is allowed and what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80


def shown(value: Any) -> str:
    """A value on one short line, whatever it is."""
    try:
        return " ".join(_SHORT.repr(value).split())
    except Exception:  # an integer of more digits than Python prints, or a type whose __repr__ fails
        return f"something of type {type(value).__name__}"


def either(choices: Iterable[Any]) -> str:
    """Choices in words: "64, 128 or 256"."""
    *first, last = map(str, choices)
    return f"{', '.join(first)} or {last}" if first else last


def refusal(subject: str, given: Any, allowed: str, remedy: str) -> str:
    """One sentence about a value that is not allowed.

    Args:
        subject: what was set: a flag, a setting.
        given: its value, of any type.
        allowed: the values that are.
        remedy: what to do, as a clause.
    """
    return f"{subject} was given as {shown(given)}; allowed: {allowed}; {remedy}"


def is_whole_number(value: Any, low: int, high: int) -> bool:
    """Whether a value is an integer from `low` to `high`; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def check_whole_number(subject: str, value: Any, low: int, high: int, remedy: str) -> None:
    """Refuse what is no integer from `low` to `high`.

    Raises:
        ValueError: in one sentence.
    """
    if not is_whole_number(value, low, high):
        raise ValueError(refusal(subject, value, f"a whole number from {low} to {high}", remedy))


def check_choice(subject: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices, the first of which is the default.

    Raises:
        ValueError: in one sentence.
    """
    if not (isinstance(value, str) and value in choices):
        raise ValueError(refusal(subject, value, either(map(repr, choices)), f"leave it out for {choices[0]!r}"))
