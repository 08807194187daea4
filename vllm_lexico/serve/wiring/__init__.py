"""What LEXICO relies on in vLLM that vLLM does not promise: tables, and the self-test at start that reads them.

A name of a table that is gone or means something else would leave an engine that starts and then answers wrongly, or
holds more memory than it says. `layers` has what a worker relies on, `pages` what the scheduler's part does, with a dry
run of vLLM's KV cache manager. They are tested where LEXICO is really used, in a tenth of a second, and end the start
with one sentence. Names that our modules import need no row: where one is gone nothing loads. Workarounds are in
`vllm_lexico/compat`.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from vllm_lexico import compat


@dataclass(frozen=True)
class Wire:
    """Names of one class of vLLM.

    names: attributes, fields, or what its methods set.
    breaks: what would happen where one is another and nobody noticed.
    ours: classes of this package whose methods of these names vLLM calls, so that they must take what vLLM's do.
    """

    owner: type
    names: str
    breaks: str
    ours: str = ""


@dataclass(frozen=True)
class Behaviour:
    """What a name does, where its being there says too little.

    check: says what this vLLM does instead; None where it does what is relied on.
    """

    name: str
    breaks: str
    check: Callable[[], str | None]


def check(rows: Sequence[Wire | Behaviour], *ours: type) -> None:
    """Read a table.

    Args:
        rows: the table.
        ours: the classes of this package that it names.

    Raises:
        ValueError: one sentence that says what this vLLM has changed and what it would break.
    """
    if found := list(failures(rows, *ours)):
        raise compat.does_not_fit("; ".join(found))


def failures(rows: Sequence[Wire | Behaviour], *ours: type) -> Iterator[str]:
    """What does not hold in this vLLM, each as a clause."""
    by_name = {one.__name__: one for one in ours}
    for row in rows:
        if isinstance(row, Behaviour):
            if problem := _otherwise(row):
                yield f"{row.name} {problem}, so {row.breaks}"
            continue
        for name in row.names.split():
            problem = None if has(row.owner, name) else "is gone"
            for own in row.ours.split():
                problem = problem or called_otherwise(getattr(row.owner, name), getattr(by_name[own], name))
            if problem:
                yield f"{row.owner.__name__}.{name} {problem}, so {row.breaks}"


def _otherwise(row: Behaviour) -> str | None:
    try:
        return row.check()
    except Exception as error:
        return f"fails ({type(error).__name__}: {error})"


def has(owner: Any, name: str) -> bool:
    """Whether a class has an attribute or a field of this name, or a method of it sets one."""
    if name in getattr(owner, "__dataclass_fields__", {}) or any(name in vars(base) for base in owner.__mro__[:-1]):
        return True
    return name in _set_by_methods(owner)


@functools.cache
def _set_by_methods(owner: type) -> set[str]:
    methods = [one for base in owner.__mro__ if base.__module__.startswith("vllm.") for one in _functions(base)]
    instructions = itertools.chain.from_iterable(map(dis.get_instructions, methods))
    return {one.argval for one in instructions if one.opname == "STORE_ATTR"}


def _functions(owner: type) -> list[FunctionType]:
    """The functions of a class as they are written: tracers and profilers wrap them, which changes nothing."""
    written = [inspect.unwrap(one) for one in vars(owner).values() if callable(one)]
    return [one for one in written if isinstance(one, FunctionType)]


def mentions(owner: type, word: str) -> bool:
    """Whether an own method of a class uses an attribute, or takes an argument, whose name has this word in it."""
    used = [(*one.__code__.co_names, *one.__code__.co_varnames) for one in _functions(owner)]
    return any(word in name for names in used for name in names)


def called_otherwise(theirs: Any, own: Any) -> str | None:
    """How a call that fits vLLM's method does not fit ours."""
    kinds = inspect.Parameter
    given, taken = (list(inspect.signature(one).parameters.values()) for one in (theirs, own))
    takes_more = {one.kind for one in taken} & {kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD}
    known = {one.name for one in taken}
    unknown = [one.name for one in given if one.name not in known]
    order = [one.name for one in taken if one.kind is kinds.POSITIONAL_OR_KEYWORD]
    positional = [one.name for one in given if one.kind is kinds.POSITIONAL_OR_KEYWORD]
    if (unknown and not takes_more) or any(a != b for a, b in zip(order, positional, strict=False)):
        return f"takes other arguments ({', '.join(unknown or positional)})"
    return None
