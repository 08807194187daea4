"""Faults of a cache, planted into a running engine: `worker_extension_cls="faults.Faults"`, then `plant`.

A test of an engine that passes with one of these planted sees nothing of the cache.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lexico_kernels.ops as ops
import torch

READERS = ("sparse_decode", "reconstruct")
ORIGINAL = {name: getattr(ops, name) for name in (*READERS, "write_tail")}


def _zeros(query: torch.Tensor, *args: Any, out: torch.Tensor | None = None, **kwargs: Any) -> Any:
    """Attention of decode gives zeros."""
    result, lse = ORIGINAL["sparse_decode"](query, *args, out=out, **kwargs)
    return result.zero_(), lse


def _reading(change: Callable[[Any, Any], tuple[Any, Any]]) -> dict[str, Callable]:
    """Both readers, with the cache and the tables that `change` makes of theirs."""

    def decode(query: Any, cache: Any, tables: Any, *args: Any, **kwargs: Any) -> Any:
        return ORIGINAL["sparse_decode"](query, *change(cache, tables), *args, **kwargs)

    def rebuild(cache: Any, tables: Any, *args: Any, **kwargs: Any) -> Any:
        return ORIGINAL["reconstruct"](*change(cache, tables), *args, **kwargs)

    return {"sparse_decode": decode, "reconstruct": rebuild}


def _wiped(cache: Any, tables: Any) -> tuple[Any, Any]:
    """Code pages are empty: all of them are one page of zeros."""
    empty = torch.zeros_like(cache.code_pages[:1]).expand(len(cache.code_pages), -1)
    return replace(cache, code_pages=empty), tables


def _another_page(cache: Any, tables: Any) -> tuple[Any, Any]:
    """Codes of a block are read from another request's page, if there is one, and of another block."""
    return cache, replace(tables, block_table=tables.block_table.roll((1, 1), (0, 1)))


def _stale_tail(key: torch.Tensor, value: torch.Tensor, cache: Any, slots: torch.Tensor) -> None:
    """Every second token in full precision is not written: its page holds what was there before."""
    ORIGINAL["write_tail"](key, value, cache, torch.where(slots % 2 == 0, slots, -1))


FAULTS: dict[str, dict[str, Callable]] = {
    "zeros": {"sparse_decode": _zeros},
    "wiped pages": _reading(_wiped),
    "another request's page": _reading(_another_page),
    "stale tail": {"write_tail": _stale_tail},
}


WRITTEN = {"stale tail"}  # these are in what is written; the others, in what is read


def plant(name: str | None) -> None:
    """Put a fault of FAULTS into this process's operations, or with None take all out."""
    for operation, function in (ORIGINAL | FAULTS.get(name or "", {})).items():
        setattr(ops, operation, function)


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The same for a while."""
    plant(name)
    try:
        yield
    finally:
        plant(None)


class Faults:
    """What an engine's worker gets in addition."""

    def plant_fault(self, name: str | None) -> None:
        """For `collective_rpc`."""
        plant(name)
