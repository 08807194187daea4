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
CODERS = ("omp_encode", "omp_encode_layers")
ORIGINAL = {name: getattr(ops, name) for name in (*READERS, "write_tail", *CODERS)}


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


def _coding_once() -> dict[str, Callable]:
    """Codes that were written stay, those of rejected drafts too: who writes the same places again changes nothing."""
    coded: set[int] = set()
    by_layer: dict[int, set[int]] = {}

    def fresh(destination: torch.Tensor, coded: set[int]) -> torch.Tensor:
        given = destination.tolist()
        kept = [place if place not in coded else -1 for place in given]
        coded.update(given)
        return torch.tensor(kept, dtype=destination.dtype, device=destination.device)

    def one(key: Any, value: Any, cache: Any, source: Any, destination: Any, **kwargs: Any) -> Any:
        places = by_layer.setdefault(cache.code_pages.data_ptr(), set(coded))
        coded.update(destination.tolist())
        return ORIGINAL["omp_encode"](key, value, cache, source, fresh(destination, places), **kwargs)

    def all_layers(stack: Any, source: Any, destination: Any, **kwargs: Any) -> Any:
        for places in by_layer.values():
            places.update(destination.tolist())
        return ORIGINAL["omp_encode_layers"](stack, source, fresh(destination, coded), **kwargs)

    return {"omp_encode": one, "omp_encode_layers": all_layers}


FAULTS: dict[str, dict[str, Callable]] = {
    "zeros": {"sparse_decode": _zeros},
    "wiped pages": _reading(_wiped),
    "another request's page": _reading(_another_page),
    "stale tail": {"write_tail": _stale_tail},
}


WRITTEN = {"stale tail"}  # these are in what is written; the others, in what is read
REJECTED_KEPT = "codes of rejected drafts are kept"  # shows where drafts are rejected, and there alone


def plant(name: str | None) -> None:
    """Put a fault, of FAULTS or REJECTED_KEPT, into this process's operations, or with None take all out."""
    changed = _coding_once() if name == REJECTED_KEPT else FAULTS.get(name or "", {})
    for operation, function in (ORIGINAL | changed).items():
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
