"""omp_encode by clusters against its twin, in poisoned memory: compiled where there is a GPU, else run on the CPU.

On a CPU `cuda_on_cpu.h` runs the kernel's source thread by thread, in random order.
"""

import pytest
import torch
from cuda_on_cpu import OnCpu, folder_for_kernels
from lexico_kernels import CodeLayout, LayerStack, RequestTables, reference
from lexico_kernels.device import nvrtc
from lexico_kernels.omp_encode import clusters as cluster
from lexico_kernels.testing import (
    check_encode,
    check_gain,
    entries_at,
    fused_tokens,
    poisoned_cache,
    raised_cache,
    records_at,
    residual_energy,
)

P = 64


@pytest.fixture(autouse=True)
def kernel(device, monkeypatch, tmp_path_factory):
    """Without a GPU, the kernel on the CPU."""
    if device == "cuda":
        if not cluster._on_device(0):
            pytest.skip("this GPU has no clusters of thread blocks")
        return
    folder = folder_for_kernels(tmp_path_factory)

    def on_cpu(name, device, *shape):
        return OnCpu(folder, cluster.FILES[1:], "cluster_omp_on_cpu.cpp", name, cluster.macros(*shape))

    monkeypatch.setattr(cluster, "_kernel", on_cpu)


def layout(D=64, Hk=2, S=(5, 4), **kwargs):
    return CodeLayout(D, Hk, *S, block_tokens=P, **kwargs)


def encode(key, value, cache, *entries, **more):
    """The kernel alone, made for such a cache."""
    assert cluster.supports_tensors(key, value, cache)
    cluster.omp_encode(key, value, cache, *entries, **more)


@pytest.mark.parametrize("count", [1, 63, P - 1, P, P + 1])
def test_sizes(count, device):
    check_encode(encode, layout(), count, device)


@pytest.mark.parametrize(
    ("D", "S", "dtype", "atoms"),
    [
        (128, (7, 3), torch.bfloat16, 513),  # a cluster of two blocks, the second with one atom
        (128, (15, 15), torch.bfloat16, 256),
        (64, (1, 1), torch.float16, 64),
        (64, (9, 17), torch.bfloat16, 130),
        (128, (31, 2), torch.float16, 300),
        (64, (3, 3), torch.float16, 1),  # the null atom alone
    ],
)
def test_shapes(D, S, dtype, atoms, device):
    check_encode(encode, layout(D, 1, S), 60, device, dtype, atoms)


@pytest.mark.parametrize(("D", "S"), [(64, (20, 12)), (128, (15, 31))])
def test_gain(D, S, device):
    check_gain(encode, layout(D, 1, S), device, torch.float16, 200)


def test_several_tiles_and_clusters(device, monkeypatch):
    """More tokens than a tile has, from several clusters, over more than one window of jobs."""
    monkeypatch.setattr(cluster, "CLUSTER_BLOCKS", 4)
    it = layout(64, 1, (2, 2))
    assert min(4 // 2, 70 // cluster.DEALT) == 2
    check_encode(encode, it, 70, device)
    cache = poisoned_cache(it, 4, atoms=64, dtype=torch.float16, device=device)
    key, value = fused_tokens(3, it, torch.float16, device)
    destination = torch.full((2 * cluster.WINDOW + 5,), -1, device=device)
    source = torch.full_like(destination, -9999, dtype=torch.int32)
    for row, entry in enumerate((7, cluster.WINDOW + 600, 2 * cluster.WINDOW + 4)):
        destination[entry], source[entry] = P + row, row
    cluster.omp_encode(key, value, cache, source, destination)
    alone = poisoned_cache(it, 4, atoms=64, dtype=torch.float16, device=device)
    cluster.omp_encode(key, value, alone, source[source >= 0], destination[destination > 0])
    assert torch.equal(cache.code_pages, alone.code_pages)


def test_a_vector_has_the_same_code_in_every_batch(device):
    it = layout(64, 2, (4, 4))
    caches = [poisoned_cache(it, 4, atoms=100, dtype=torch.float16, device=device) for _ in range(2)]
    key, value = fused_tokens(40, it, torch.float16, device)
    at = torch.arange(40, device=device)
    cluster.omp_encode(key, value, caches[0], at.int(), at + P)
    cluster.omp_encode(key, value, caches[1], at[17:18].int(), at[17:18] + P)
    for kv in ("key", "value"):
        both = [records_at(cache, at[17:18] + P, kv) for cache in caches]
        assert torch.equal(*both)


def test_stops_early(device):
    it = layout(64, 2, (12, 12))
    caches = check_encode(encode, it, 20, device, relative_error=0.6)
    slots = torch.tensor([2 * P + 5], device=device)
    used = [int((entries_at(cache, slots, "key") != 0).sum()) for cache in caches]
    assert 0 < used[1] < 2 * 12
    assert abs(used[0] - used[1]) <= 2


def test_odd_vectors(device):
    """Zero, NaN, infinite, huge and tiny vectors, and some that a single atom describes."""
    it = layout(64, 2, (6, 6))
    cache = poisoned_cache(it, 4, atoms=64, dtype=torch.bfloat16, device=device)
    key = torch.zeros(10, 2, 64, device=device, dtype=torch.bfloat16)
    key[0, 0, 3], key[1, 0, 3], key[2, 0, 3] = float("nan"), float("inf"), float("-inf")
    key[3], key[4] = 3e38, 1e30
    key[5] = (2 * cache.key.atoms[:, 7].float() * cache.key.stretch + cache.key.mean).bfloat16()
    cache.key.mean.copy_(cache.key.mean.bfloat16())  # so that a vector can be the mean
    key[6] = cache.key.mean.bfloat16()
    at = torch.arange(10, device=device)
    cluster.omp_encode(key, key, cache, at.int(), at + P)
    tables = RequestTables(*(torch.tensor(x, dtype=torch.int32, device=device) for x in ([[1]], [[0] * P], [0], [P])))
    out_key, out_value = torch.full((2, 10, 2, 64), float("nan"), device=device)
    reference.reconstruct(cache, tables, torch.zeros_like(at).int(), at.int(), out_key, out_value)
    for token, head in ((0, 0), (1, 0), (2, 0), (6, 0), (6, 1)):
        torch.testing.assert_close(out_key[token, head], cache.key.mean[head])
    assert out_key.isfinite().all()
    torch.testing.assert_close(out_key[5], key[5].float(), rtol=2e-2, atol=2e-2)


def test_duplicate_atoms(device):
    it = layout(64, 1, (16, 16))
    cache = poisoned_cache(it, 4, atoms=65, dtype=torch.float16, device=device)
    for book in (cache.key, cache.value):
        book.atoms[:, 33:65] = book.atoms[:, 1:33]
    key, value = fused_tokens(20, it, torch.float16, device)
    at = torch.arange(20, device=device)
    cluster.omp_encode(key, value, cache, at.int(), at + P)
    centred = (key.float() - cache.key.mean) / cache.key.stretch
    assert (residual_energy(cache, at + P, key, "key") <= centred.square().sum(-1) * 1.001).all()


@pytest.mark.parametrize(("S", "atoms"), [((4, 4), 100), ((2, 5), 100), ((3, 2), 600)])  # 600: two blocks a cluster
def test_all_layers_code_as_each_does(S, atoms, device, monkeypatch):
    """From the tail, by clusters that take more than one dictionary; and not at all where there are too many tokens."""
    monkeypatch.setattr(cluster, "LAYERS", cluster.LAYERS._replace(cluster_blocks=2))
    it = layout(64, 2, S)
    pages = 2 + 40 // it.tail_tokens
    each, at_once = (
        [
            raised_cache(poisoned_cache(it, pages, atoms=atoms, dtype=torch.float16, device=device, seed=seed))
            for seed in range(2)
        ]
        for _ in range(2)
    )
    for seed, cache in enumerate(each + at_once):
        key, value = fused_tokens(40, it, torch.float16, device, seed % 2)
        reference.write_tail(key, value, cache, torch.arange(40, device=device) + it.tail_tokens)
    entries = torch.arange(50, device=device)
    source, destination = (-1 - it.tail_tokens - entries).int(), torch.where(entries < 40, entries + P, -1)
    layers = LayerStack.of(at_once)
    cluster.omp_encode_layers(layers, source, destination, most=39)
    assert all((cache.code_pages == 0xFF).all() for cache in at_once)
    cluster.omp_encode_layers(layers, source, destination, most=40)
    for one, other in zip(each, at_once, strict=True):
        cluster.omp_encode(one.tail_pages[:0, :, 0, 0], one.tail_pages[:0, :, 0, 1], one, source, destination)
        assert torch.equal(one.code_pages, other.code_pages)
    assert not torch.equal(at_once[0].code_pages, at_once[1].code_pages)


def test_skips_everything(device):
    it = layout()
    cache = poisoned_cache(it, 3, atoms=64, dtype=torch.float16, device=device)
    key, value = fused_tokens(5, it, torch.float16, device)
    nowhere = torch.tensor([-1, 0, P - 1, -5, 3], device=device)
    cluster.omp_encode(key, value, cache, torch.full((5,), -9999, dtype=torch.int32, device=device), nowhere)
    cluster.omp_encode(key[:0], value[:0], cache, torch.zeros(0, dtype=torch.int32, device=device), nowhere[:0])
    assert (cache.code_pages == 0xFF).all()


def test_what_it_does_not_support(device):
    """Then the Triton kernel codes: other codecs, precisions and head sizes, rows that 8 bytes do not divide."""
    for it, dtype in (
        (layout(codec="paper"), torch.float16),
        (layout(96), torch.float16),
        (layout(256, S=(31, 31)), torch.float16),
        (layout(element_bytes=4), torch.float32),
    ):
        cache = poisoned_cache(it, 2, atoms=64, dtype=dtype, device=device)
        assert not cluster.supports_tensors(*fused_tokens(2, it, dtype, device), cache)
    it = layout()
    cache = poisoned_cache(it, 2, atoms=64, dtype=torch.float16, device=device)
    key, value = fused_tokens(2, it, torch.float16, device)
    assert cluster.supports_tensors(key, value, cache) and not cluster.supports_tensors(key.bfloat16(), value, cache)
    odd = torch.zeros(2, 2 * 64 + 1, device=device, dtype=torch.float16)[:, :128].view(2, 2, 64)
    assert not cluster.supports_tensors(odd, value, cache)


@pytest.mark.parametrize(
    ("D", "S", "atoms", "half"),
    [
        (128, 15, 4096, False),  # the default of a model in bfloat16
        (128, 31, 4096, False),  # the least of a tile's vectors per block
        (64, 15, 1024, True),
        (128, 7, 4096, True),
    ],
)
def test_compiles_for_an_h100(D, S, atoms, half, monkeypatch, tmp_path):
    """By the compiler that serving uses, which needs no GPU; and with shared memory that a block can have."""
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = cluster.macros(CodeLayout(D, 8, S, S), (atoms, atoms), (atoms * D, 0), half)
    assert cluster.NAME.encode() in nvrtc.compile_source(nvrtc.source_text(cluster.FILES), "sm_90a", macros)


@pytest.mark.parametrize("S", range(1, 32))
def test_a_block_has_the_shared_memory(S):
    """Of an H100; that the kernel counts the same, the compiler asserts."""
    for D, atoms in ((128, 4096), (64, 3000), (128, 1024)):
        macros = cluster.macros(CodeLayout(D, 8, S, S), (atoms, atoms), (atoms * D, 0), False)
        assert macros["SHARED_BYTES"] <= 232448
