"""Coding all layers in one launch against coding each by itself, in poisoned memory."""

import dataclasses

import pytest
import torch
from lexico_kernels import CodeLayout, LayerStack, ops, reference
from lexico_kernels.device import launch
from lexico_kernels.device.launch import PursuitLaunch
from lexico_kernels.omp_encode import all_layers as omp_layers
from lexico_kernels.omp_encode import clusters as cluster
from lexico_kernels.omp_encode import tiles as omp
from lexico_kernels.testing import poisoned_cache, raised_cache, records_at

P, TILE = 64, 16
DTYPE = torch.float16  # the interpreter has no bfloat16 products


def layout(D=64, Hk=2, S=(3, 2), **kwargs):
    return CodeLayout(D, Hk, *S, block_tokens=P, **kwargs)


def layers_of(it, device, count=2, atoms=60, dtype=DTYPE):
    """Layers with tokens of their own in their tails: of page 1 and on, as many as fit."""
    caches = [poisoned_cache(it, 12, atoms=atoms, dtype=dtype, device=device, seed=seed) for seed in range(count)]
    for seed, cache in enumerate(caches):
        slots = torch.arange(it.tail_tokens, 12 * it.tail_tokens, device=device)
        generator = torch.Generator().manual_seed(seed)
        key, value = torch.randn(2, len(slots), it.num_kv_heads, it.head_dim, generator=generator).to(device, dtype)
        reference.write_tail(key, value, cache, slots)
    return [raised_cache(cache) for cache in caches]


def entries(it, count, room, device):
    """The first `count` of `room` jobs are to be coded, from tail slots in turn."""
    slots = torch.arange(room) * 7 % (11 * it.tail_tokens) + it.tail_tokens
    destination = torch.arange(room) + P + 3
    destination[count:] = -1
    return (-1 - slots).int().to(device), destination.to(device)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """The same tiles in both kernels, so that their bits are the same."""
    row = PursuitLaunch(1 << 62, TILE, 128, 4, 3)
    monkeypatch.setattr(omp, "pursuit_launch", lambda *_: row)
    monkeypatch.setattr(omp_layers, "LAYERS", omp_layers.LAYERS._replace(tile=TILE, few_tile=TILE, tiles=2))


@pytest.mark.parametrize(
    ("codec", "D", "count", "room"),
    [
        *((codec, 64, *jobs) for codec in ("packed16", "exact") for jobs in ((0, 40), (1, 40), (40, 40), (51, 64))),
        ("packed16", 256, 5, 9),
    ],
)
def test_triton_codes_as_each_layer_does(codec, D, count, room, device):
    it = layout(D, S=(D // 20, 2), codec=codec)
    each, at_once = layers_of(it, device), layers_of(it, device)
    addresses = entries(it, count, room, device)
    for cache in each:
        nothing = cache.tail_pages[:0, :, 0, 0]
        omp.omp_encode(nothing, nothing, cache, *addresses)
    omp_layers.omp_encode_layers(LayerStack.of(at_once), *addresses)
    for one, other in zip(each, at_once, strict=True):
        assert torch.equal(one.code_pages, other.code_pages)
    if count:
        assert not torch.equal(at_once[0].code_pages, at_once[1].code_pages)


@pytest.mark.parametrize(("fewer", "codes"), [(0, True), (32, True), (33, False), (40, False)])
def test_triton_leaves_few_to_another_launch(fewer, codes, device):
    it = layout()
    caches = layers_of(it, device, count=1)
    omp_layers.omp_encode_layers(LayerStack.of(caches), *entries(it, 33, 40, device), fewer=fewer)
    assert bool((caches[0].code_pages != 0xFF).any()) == codes


@pytest.mark.parametrize(
    ("jobs", "fewer", "tile", "programs"),
    [(32, 0, 16, 2), (256, 0, 16, 4), (2048, 0, 16, 4), (2049, 0, 64, 4), (256, 64, 64, 4), (65, 64, 64, 2)],
)
def test_tiles_are_small_where_short_lists_are_not_left_to_another_launch(jobs, fewer, tile, programs, monkeypatch):
    """A pass over the atoms takes as long for few vectors as for many, so few are dealt out to more programs."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **constants: launched.append((grid[0], constants["TILE"]))

    monkeypatch.setattr(omp_layers, "LAYERS", launch.LAYERS)
    monkeypatch.setattr(omp_layers, "_omp_encode_layers", Kernel())
    source = torch.full((jobs,), -1, dtype=torch.int32)
    omp_layers.omp_encode_layers(LayerStack.of(layers_of(layout(), "cpu")), source, source.long(), fewer=fewer)
    assert launched == [(programs, tile)]


@pytest.mark.parametrize("codec", ["packed16", "paper", "exact"])
def test_the_twin_codes_as_each_layer_does(codec):
    it = layout(codec=codec)
    each, at_once = layers_of(it, "cpu"), layers_of(it, "cpu")
    addresses = entries(it, 33, 40, "cpu")
    for cache in each:
        nothing = cache.tail_pages[:0, :, 0, 0]
        reference.omp_encode(nothing, nothing, cache, *addresses, relative_error=0.3)
    ops.omp_encode_layers(LayerStack.of(at_once), *addresses, relative_error=0.3)  # on a CPU that is the twin
    for one, other in zip(each, at_once, strict=True):
        assert torch.equal(one.code_pages, other.code_pages)


def test_layers_that_differ_are_not_stacked(device):
    alike = [poisoned_cache(layout(), 4, atoms=64, dtype=DTYPE, device=device, seed=seed) for seed in range(2)]
    stack = LayerStack.of(alike)
    assert stack.addresses.shape == (2, LayerStack.macros()["COLUMNS"]) == (2, 16)
    for name, column in (("value.mean", "VALUE_MEAN_COLUMN"), ("code_pages", "CODE_PAGES_COLUMN")):
        assert LayerStack.column(name) == LayerStack.macros()[column]
    assert int(stack.addresses[1, LayerStack.column("value.mean")]) == alike[1].value.mean.data_ptr()
    assert LayerStack.of([]) is None
    other_sparsity = poisoned_cache(layout(S=(2, 3)), 4, atoms=64, dtype=DTYPE, device=device)
    fewer_atoms = poisoned_cache(layout(), 4, atoms=63, dtype=DTYPE, device=device)
    shared = dataclasses.replace(alike[0], key=alike[0].value)
    unaligned = dataclasses.replace(alike[0], code_pages=alike[0].code_pages[:, 8:])
    for other in (other_sparsity, fewer_atoms, shared, unaligned):
        assert LayerStack.of([alike[1], other]) is None


@pytest.mark.gpu
@pytest.mark.parametrize("count", [0, 1, 32, 64, 65, 300])
@pytest.mark.parametrize(("codec", "D"), [("packed16", 128), ("exact", 128), ("packed16", 256)])
def test_product_codes_every_count_once(codec, D, count):
    """Whichever of the launches codes, all is coded and nothing else is; also when a graph of it is replayed."""
    it = CodeLayout(D, 2, 7, 5, codec=codec)
    caches = layers_of(it, "cuda", atoms=4096, dtype=torch.bfloat16)
    layers, (source, destination) = LayerStack.of(caches), entries(it, 0, 320, "cuda")
    ops.omp_encode_layers(layers, source, destination)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.omp_encode_layers(layers, source, destination)
    destination[:count] = torch.arange(count, device="cuda") + 128
    graph.replay()
    for cache in caches:
        for kv in ("key", "value"):
            at = torch.arange(12 * 128, device="cuda")
            poison = (records_at(cache, at, kv) == 0xFF).all(-1).all(-1)
            assert poison.sum() == len(at) - count and not poison[128 : 128 + count].any()
    made = codec == "packed16" and D in cluster.HEAD_DIMS
    assert cluster.supports_layers(layers) == (made and cluster._on_device(0))
