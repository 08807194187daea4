"""omp_encode by a streaming dictionary against its twin, in poisoned memory: compiled on Hopper, else on the CPU."""

import pytest
import torch
from cuda_on_cpu import OnCpu, folder_for_kernels
from lexico_kernels import CodeLayout, LayerStack, RequestTables, reference
from lexico_kernels.device import nvrtc
from lexico_kernels.device.launch import STREAM_DIM
from lexico_kernels.omp_encode import streams
from lexico_kernels.testing import (
    check_encode,
    check_gain,
    entries_at,
    fused_tokens,
    poisoned_cache,
    raised_cache,
    records_at,
    residual_energy,
    stream_cache,
)

P, D = 64, STREAM_DIM


@pytest.fixture(autouse=True)
def kernel(device, monkeypatch, tmp_path_factory):
    """Without a GPU, the kernel on the CPU."""
    if device == "cuda":
        if not streams._on_device(0):
            pytest.skip("this GPU has no products of four warps")
        return
    folder = folder_for_kernels(tmp_path_factory)

    def on_cpu(name, device, *shape):
        return OnCpu(folder, streams.FILES[1:], "stream_omp_on_cpu.cpp", name, streams.macros(*shape))

    monkeypatch.setattr(streams, "_kernel", on_cpu)
    monkeypatch.setattr(streams, "multiprocessors", lambda device: 3)  # so that a block codes several tiles


def layout(Hk=1, S=(5, 4), **kwargs):
    return CodeLayout(D, Hk, *S, block_tokens=P, **kwargs)


def encode(key, value, cache, *entries, **more):
    """The kernel alone, made for such a cache."""
    if cache.key.stream_atoms is None:
        cache = stream_cache(cache)
    assert streams.supports_tensors(key, value, cache)
    streams.omp_encode(key, value, cache, *entries, **more)


@pytest.mark.parametrize(
    ("count", "Hk", "S", "dtype", "atoms"),
    [
        (streams.TILE + 1, 1, (3, 4), torch.bfloat16, 513),  # three chunks, the last with one atom
        (40, 1, (9, 16), torch.float16, 1300),  # more chunks than are in flight
        (9, 1, (3, 3), torch.bfloat16, 1),  # the null atom alone
    ],
)
def test_leaves_as_little_as_the_twin(count, Hk, S, dtype, atoms, device):
    check_encode(encode, layout(Hk, S), count, device, dtype, atoms)


def test_gain(device):
    check_gain(encode, layout(S=(4, 4)), device, torch.bfloat16, 140)


def test_own_dictionaries_of_heads(device):
    """Each head is coded by its own atoms."""
    it = layout(2, (4, 4))
    caches = [poisoned_cache(it, 4, atoms=140, dtype=torch.bfloat16, device=device) for _ in range(2)]
    assert caches[0].key.head_stride
    key, value = fused_tokens(20, it, torch.bfloat16, device)
    at = torch.arange(20, device=device)
    reference.omp_encode(key, value, caches[0], at.int(), at + P)
    encode(key, value, caches[1], at.int(), at + P)
    for kv, vectors in (("key", key), ("value", value)):
        want, got = (residual_energy(cache, at + P, vectors, kv).sum(0) for cache in caches)
        assert (got <= 1.1 * want).all(), (kv, got, want)


def test_a_vector_has_the_same_code_in_every_batch(device):
    it = layout(1, (4, 4))
    caches = [poisoned_cache(it, 4, atoms=140, dtype=torch.bfloat16, device=device) for _ in range(2)]
    key, value = fused_tokens(40, it, torch.bfloat16, device)
    at = torch.arange(40, device=device)
    encode(key, value, caches[0], at.int(), at + P)
    encode(key, value, caches[1], at[17:18].int(), at[17:18] + P)
    for kv in ("key", "value"):
        both = [records_at(cache, at[17:18] + P, kv) for cache in caches]
        assert torch.equal(*both)


def test_stops_early(device):
    it = layout(1, (9, 16))
    caches = check_encode(encode, it, 20, device, atoms=1300, relative_error=0.8)
    slots = torch.tensor([2 * P + 5], device=device)
    used = [int((entries_at(cache, slots, "key") != 0).sum()) for cache in caches]
    assert 0 < used[1] < 9
    assert abs(used[0] - used[1]) <= 2


def test_odd_vectors(device):
    """Zero, NaN, infinite, huge and tiny vectors, and some that a single atom describes."""
    it = layout(2, (4, 4))
    cache = poisoned_cache(it, 4, atoms=140, dtype=torch.bfloat16, device=device)
    key = torch.zeros(10, 2, D, device=device, dtype=torch.bfloat16)
    key[0, 0, 3], key[1, 0, 3], key[2, 0, 3] = float("nan"), float("inf"), float("-inf")
    key[3], key[4] = 3e38, 1e30
    key[5] = (2 * cache.key.atoms[:, 7].float() * cache.key.stretch + cache.key.mean).bfloat16()
    cache.key.mean.copy_(cache.key.mean.bfloat16())  # so that a vector can be the mean
    key[6] = cache.key.mean.bfloat16()
    at = torch.arange(10, device=device)
    encode(key, key, cache, at.int(), at + P)
    tables = RequestTables(*(torch.tensor(x, dtype=torch.int32, device=device) for x in ([[1]], [[0] * P], [0], [P])))
    out_key, out_value = torch.full((2, 10, 2, D), float("nan"), device=device)
    reference.reconstruct(cache, tables, torch.zeros_like(at).int(), at.int(), out_key, out_value)
    for token, head in ((0, 0), (1, 0), (2, 0), (6, 0), (6, 1)):
        torch.testing.assert_close(out_key[token, head], cache.key.mean[head])
    assert out_key.isfinite().all()
    torch.testing.assert_close(out_key[5], key[5].float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("count", "S", "atoms"), [(40, (4, 4), 140), (300, (2, 4), 1300)])
def test_all_layers_code_as_each_does(count, S, atoms, device):
    """From the tail, by blocks that take several tiles and dictionaries; not at all where there are too few tokens."""
    it = layout(2, S)
    pages = 6 + count // it.tail_tokens
    each, at_once = (
        [
            stream_cache(
                raised_cache(poisoned_cache(it, pages + 4, atoms=atoms, dtype=torch.bfloat16, device=device, seed=i))
            )
            for i in range(2)
        ]
        for _ in range(2)
    )
    for i, cache in enumerate(each + at_once):
        key, value = fused_tokens(count, it, torch.bfloat16, device, i % 2)
        reference.write_tail(key, value, cache, torch.arange(count, device=device) + it.tail_tokens)
    entries = torch.arange(count + 300, device=device)
    source = (-1 - it.tail_tokens - entries.clamp(max=count - 1)).int()
    destination = torch.where(entries < count, entries + P, -1)
    layers = LayerStack.of(at_once)
    streams.omp_encode_layers(layers, source, destination, fewer=count)
    assert all((cache.code_pages == 0xFF).all() for cache in at_once)
    streams.omp_encode_layers(layers, source, destination, fewer=count - 1)
    for one, other in zip(each, at_once, strict=True):
        streams.omp_encode(one.tail_pages[:0, :, 0, 0], one.tail_pages[:0, :, 0, 1], one, source, destination)
        assert torch.equal(one.code_pages, other.code_pages)
    assert not torch.equal(at_once[0].code_pages, at_once[1].code_pages)


def test_skips_everything(device):
    it = layout(2, (4, 4))
    cache = poisoned_cache(it, 4, atoms=140, dtype=torch.bfloat16, device=device)
    key, value = fused_tokens(5, it, torch.bfloat16, device)
    nowhere = torch.tensor([-1, 0, P - 1, -5, 3], device=device)
    encode(key, value, cache, torch.full((5,), -9999, dtype=torch.int32, device=device), nowhere)
    encode(key[:0], value[:0], cache, torch.zeros(0, dtype=torch.int32, device=device), nowhere[:0])
    assert (cache.code_pages == 0xFF).all()


def test_what_it_does_not_support(device):
    """Then the Triton kernel codes: other codecs, precisions, head sizes and sparsities, atoms that have no e4m3."""
    for it, dtype in (
        (layout(codec="paper"), torch.float16),
        (CodeLayout(64, 1, 4, 4, block_tokens=P), torch.float16),
        (layout(S=(17, 4)), torch.float16),
        (layout(element_bytes=4), torch.float32),
    ):
        cache = poisoned_cache(it, 2, atoms=64, dtype=dtype, device=device)
        if it.head_dim == D:
            cache = stream_cache(cache)
        assert not streams.supports_tensors(*fused_tokens(2, it, dtype, device), cache)
    it = layout()
    cache = poisoned_cache(it, 2, atoms=64, dtype=torch.float16, device=device)
    key, value = fused_tokens(2, it, torch.float16, device)
    assert not streams.supports_tensors(key, value, cache)
    cache = stream_cache(cache)
    assert streams.supports_tensors(key, value, cache) and not streams.supports_tensors(key.bfloat16(), value, cache)
    odd = torch.zeros(2, D + 4, device=device, dtype=torch.float16)[:, :D].view(2, 1, D)
    assert not streams.supports_tensors(odd, value, cache)


@pytest.mark.parametrize(("S", "half"), [((15, 15), False), ((16, 7), True)])
def test_compiles_for_an_h100(S, half, monkeypatch, tmp_path):
    """By the compiler that serving uses, which needs no GPU; that its shared memory fits, the kernel asserts."""
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    macros = streams.macros(CodeLayout(D, 8, *S), (4096, 4000), (True, False), half)
    assert streams.NAME.encode() in nvrtc.compile_source(nvrtc.source_text(streams.FILES), "sm_90a", macros)
