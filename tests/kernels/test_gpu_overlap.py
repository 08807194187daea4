"""Steps of decode whose kernels start before the one before has ended, on a CUDA device: the bits of ordinary launches.

`pytest -m gpu tests/kernels/test_gpu_overlap.py`
"""

import functools
from typing import NamedTuple

import pytest
import torch
from lexico_kernels import CodeLayout, LayerCache, RequestTables, ops
from lexico_kernels.device import launch
from lexico_kernels.device.launch import OVERLAP_CAPABILITY
from lexico_kernels.sparse_decode import lookup, lookup_sizes
from lexico_kernels.testing import random_problem
from torch import Tensor

pytestmark = pytest.mark.gpu

D, N, HK, HQ, P, S = 128, 4096, 8, 32, 128, 15
REPLAYS = 50
LENGTHS = {"long": (9000, 17000, 300, 70), "crowd": (2048, 500, 1, 1200) * 6, "one": (20000,)}


class Layer(NamedTuple):
    """A layer's pages, and for a step's tokens, one of each request, their slots, requests and lengths."""

    cache: LayerCache
    tables: RequestTables
    slots: Tensor
    request: Tensor
    lengths: Tensor

    @classmethod
    @functools.cache
    def random(cls, lengths: tuple[int, ...], seed: int) -> "Layer":
        it = CodeLayout(D, HK, S, S, block_tokens=P)
        problem = random_problem(it, lengths, atoms=N, dtype=torch.bfloat16, device="cuda", raw_tokens=100, seed=seed)
        length, request = (torch.tensor(each, dtype=torch.int32).cuda() for each in (lengths, range(len(lengths))))
        last = length.long() - 1
        page = problem.tables.tail_block_table[request.long(), last // it.tail_tokens]
        slots = page.long() * it.tail_tokens + last % it.tail_tokens
        return cls(problem.cache, problem.tables, slots, request, length)


def chain(layers: list[Layer], query: Tensor) -> list[Tensor]:
    """All layers' kernels with nothing between them, on the same scratch; each takes what the one before answered.

    A layer writes rows of the last one's answer to its tail, so it must wait for `merge`; and scratch must not be
    written again before it has been read.
    """
    outs = []
    for cache, tables, slots, request, lengths in layers:
        ops.write_tail(query[:, :HK], query[:, HK : 2 * HK], cache, slots)
        query, lse = ops.sparse_decode(query, cache, tables, request, lengths, scale=D**-0.5)
        outs += [query, lse]
    return outs


@pytest.fixture(autouse=True)
def on_a_gpu_that_can():
    if torch.cuda.get_device_capability() < OVERLAP_CAPABILITY:
        pytest.skip("kernels start one after another on this GPU")


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("load", LENGTHS)
def test_two_layers_answer_alike(load, sliced, monkeypatch):
    """In a graph that is replayed, and launched one by one; with queries that change."""
    layers = [Layer.random(LENGTHS[load], seed) for seed in range(2)]
    if sliced:
        monkeypatch.setattr(lookup_sizes, "LOOKUP_SCRATCH_BYTES", 1)
    queries = torch.randn(REPLAYS, len(LENGTHS[load]), HQ, D, device="cuda").bfloat16()
    assert all(lookup.supports(queries[0], *each[:2]) for each in layers)
    monkeypatch.setattr(launch, "OVERLAP", False)
    want = [chain(layers, query) for query in queries]
    tails = [each.cache.tail_pages.clone().view(torch.int16) for each in layers]  # bits: unwritten ones are NaN

    monkeypatch.setattr(launch, "OVERLAP", True)
    query = queries[0].clone()
    chain(layers, query)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = chain(layers, query)
    for turn, some in enumerate(queries):
        query.copy_(some)
        graph.replay()
        assert all(map(torch.equal, outs, want[turn])), turn
    for each, tail in zip(layers, tails, strict=True):
        assert torch.equal(each.cache.tail_pages.view(torch.int16), tail)
    for turn, some in enumerate(queries):
        assert all(map(torch.equal, chain(layers, some), want[turn])), turn


@pytest.mark.parametrize("overlap", [False, True])
def test_a_graph_has_edges_of_their_own_kind(overlap, monkeypatch):
    """Between the five kernels of a layer, where they overlap; what follows is launched as ever and waits for all."""
    from cuda.bindings import driver

    layers, query = [Layer.random(LENGTHS["one"], 0)], torch.randn(1, HQ, D, device="cuda").bfloat16()
    monkeypatch.setattr(launch, "OVERLAP", overlap)
    chain(layers, query)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        _ = chain(layers, query)[0] + 1
    get_edges = getattr(driver, "cuGraphGetEdges_v2", driver.cuGraphGetEdges)  # before version 13 with this name
    captured = driver.CUgraph(graph.raw_cuda_graph())
    count = get_edges(captured)[-1]
    edges = get_edges(captured, count)[3]
    kind = driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC
    assert sum(edge.type == kind.value for edge in edges) == (4 if overlap else 0)
