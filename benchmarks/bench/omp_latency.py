"""Latency of one launch of `omp_encode` of few vectors, inside a CUDA graph as a decode step runs it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lexico_kernels import ops
from lexico_kernels.omp_encode import tiles as omp
from lexico_kernels.timing import graph_milliseconds

from bench.omp_vectors import CapturedLayer
from bench.record import record

HEADS = 8  # of the shape that is timed; a token has 2 * HEADS vectors
VECTORS = (32, 256, 1024, 2048)
LAUNCHES = 8  # in a graph, one after another
# Copies of the dictionary that the launches take in turn: one stays in L2, eight of 8 heads (16 MiB each at N = 4,096)
# do not fit there and come from memory, as the layers of a model do.
COPIES = {"L2": 1, "memory": LAUNCHES}

Encode = Callable[..., None]


def launch_us(encode: Encode, layers: list[CapturedLayer], tokens: int, sparsity: int) -> float:
    """Median time of one launch in a replayed graph of LAUNCHES, in microseconds. layers: taken in turn."""
    caches = [layer.cache(sparsity) for layer in layers]
    source = torch.arange(tokens, device="cuda", dtype=torch.int32)
    destination = source.long() + caches[0].layout.block_tokens

    turns = itertools.cycle(zip(layers, caches, strict=True))

    def launch() -> None:
        layer, cache = next(turns)
        encode(*layer.vectors[:, :tokens], cache, source, destination)

    return graph_milliseconds(launch, LAUNCHES, repeats=50) * 1e3


def record_latencies(captured: CapturedLayer, sparsity: int, case: dict[str, Any], out: Path) -> None:
    """Time every size with own and shared dictionaries; the product's choice beside the Triton kernel."""
    print(f"S {sparsity}, us a launch: product / Triton kernel")
    for shared in (False, True):
        for dictionary, copies in COPIES.items():
            few = CapturedLayer(captured.vectors[:, : max(VECTORS)], captured.atoms, captured.means,
                                captured.stretches, captured.levels, captured.words)  # fmt: skip
            layers = [few.spread(HEADS, shared, copy) for copy in range(copies)]
            for vectors in VECTORS:
                tokens = vectors // (2 * HEADS)
                times = [launch_us(encode, layers, tokens, sparsity) for encode in (ops.omp_encode, omp.omp_encode)]
                words = {"vectors": vectors, "heads": HEADS, "shared": shared, "dictionary_in": dictionary}
                record("omp", case | words, "latency_us", times[0], "Triton kernel", times[1], folder=out)
                where = "shared" if shared else "own"
                print(f"  {vectors:5d} vectors, {where} dictionaries in {dictionary}: {times[0]:.1f} / {times[1]:.1f}")
            del layers
