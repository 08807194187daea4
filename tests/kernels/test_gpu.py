"""Compiled kernels at serving shapes, on a CUDA device: `pytest -m gpu tests/kernels/test_gpu.py`."""

import pytest
import torch
from lexico_kernels import CodeLayout, ops, reference
from lexico_kernels.device import nvrtc
from lexico_kernels.device.launch import fp8_fits
from lexico_kernels.memory.records import scale_view
from lexico_kernels.omp_encode import clusters as cluster
from lexico_kernels.omp_encode import tiles as omp
from lexico_kernels.sparse_decode import lookup, lookup_sizes
from lexico_kernels.sparse_decode import portable as decode
from lexico_kernels.testing import (
    OMP_ENERGY_RATIO,
    assert_close,
    check_gain,
    clear_entries,
    fp8_cache,
    poisoned_cache,
    random_problem,
    records_at,
    residual_energy,
    vectors_like_the_dictionary,
)

pytestmark = pytest.mark.gpu

D, N, HK, HQ, P = 128, 4096, 8, 32, 128
SCALE = D**-0.5
DTYPES = [torch.bfloat16, torch.float16]
CODES = [("packed16", 15), ("packed16", 7), ("packed16", 31), ("exact", 15)]


def layout(codec="packed16", S=15, dtype=torch.bfloat16, Hk=HK, head_dim=D):
    return CodeLayout(head_dim, Hk, S, S, codec=codec, element_bytes=dtype.itemsize)


def cuda(values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device="cuda")


def energies(cache, destination, key, value):
    """Residual energy of K and V records, over all vectors, stretch taken off."""
    vectors_of = (("key", key), ("value", value))
    return [float(residual_energy(cache, destination, vectors, kv).sum()) for kv, vectors in vectors_of]


@pytest.mark.parametrize("count", [1, 3, 63, P, 5 * P + 1])
@pytest.mark.parametrize(("codec", "S"), CODES)
@pytest.mark.parametrize("encode", ["product", "triton", "fp8"])  # the product's may be the cluster kernel
def test_omp_encode(encode, codec, S, count):
    if encode == "fp8" and not fp8_fits(D, S):
        pytest.skip("codes of so many atoms are made without fp8 atoms")
    it = layout(codec, S)
    source = torch.arange(count, device="cuda", dtype=torch.int32)
    destination = torch.arange(count, device="cuda") + P
    want, got = torch.zeros(2), torch.zeros(2)
    # One token has eight vectors, where near ties that fall the other way do not average out: so many draws of few.
    for seed in range(max(1, P // count)):
        caches = [poisoned_cache(it, 8, atoms=N, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
        if encode == "fp8":
            caches[1] = fp8_cache(caches[1])
        key, value = vectors_like_the_dictionary(count, caches[0], seed)
        reference.omp_encode(key, value, caches[0], source, destination)
        (ops if encode == "product" else omp).omp_encode(key, value, caches[1], source, destination)
        want += torch.tensor(energies(caches[0], destination, key, value))
        got += torch.tensor(energies(caches[1], destination, key, value))
    assert (got <= OMP_ENERGY_RATIO["many"] * want).all(), (got, want)
    beyond = torch.arange(P + count, 8 * P, device="cuda")
    assert (records_at(caches[1], beyond, "key") == 0xFF).all()


@pytest.mark.parametrize(
    ("head_dim", "atoms", "S", "dtype"),
    [
        (64, 1024, 15, torch.float16),
        (128, 4096, 15, torch.float32),
        (128, 1024, 1, torch.bfloat16),
        (128, 3000, 7, torch.bfloat16),  # a cluster of six
        (64, 4096, 31, torch.bfloat16),
        (80, 4096, 9, torch.bfloat16),
        (96, 4096, 11, torch.bfloat16),
        (112, 4096, 13, torch.float16),
        (192, 4096, 23, torch.bfloat16),
        (256, 4096, 15, torch.float16),
        (256, 4096, 31, torch.bfloat16),
        (256, 1024, 31, torch.float32),
    ],
)
def test_omp_encode_shapes(head_dim, atoms, S, dtype):
    it = layout("packed16", S, dtype, Hk=2, head_dim=head_dim)
    for count in (200, 4000):  # by clusters where there are some, and by Triton
        caches = [poisoned_cache(it, 2 + count // P, atoms=atoms, dtype=dtype, device="cuda") for _ in range(2)]
        key, value = vectors_like_the_dictionary(count, caches[0])
        source = torch.arange(count, device="cuda", dtype=torch.int32)
        destination = torch.arange(count, device="cuda") + P
        reference.omp_encode(key, value, caches[0], source, destination)
        ops.omp_encode(key, value, caches[1], source, destination)
        want, got = (torch.tensor(energies(cache, destination, key, value)) for cache in caches)
        # Of 400 vectors each, near ties that fall the other way move the energy by 1.5 % up or down; of all, by less.
        assert got.sum() <= OMP_ENERGY_RATIO["many" if count > 1000 else "few"] * want.sum(), (got, want)


@pytest.mark.parametrize("encode", [omp.omp_encode, cluster.omp_encode])
@pytest.mark.parametrize("S", [7, 15])
def test_gain(encode, S):
    check_gain(encode, layout("packed16", S, Hk=2), "cuda", torch.bfloat16, N)


def test_a_vector_has_the_same_code_alone_and_among_many():
    """By clusters, whichever is dealt what and whoever waits for whom; at once, and again from a graph that skips."""
    it, count = layout(), 2 * P
    caches = [poisoned_cache(it, 8, atoms=N, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    key, value = vectors_like_the_dictionary(count, caches[0])
    if not cluster.supports(key, value, caches[0]):
        pytest.skip("this GPU has no clusters of thread blocks")
    source, destination = torch.arange(count, device="cuda", dtype=torch.int32), torch.arange(count, device="cuda") + P
    ops.omp_encode(key, value, caches[0], source, destination)
    some = torch.full_like(destination, -1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.omp_encode(key, value, caches[1], source, some)
    for rows in (range(1), range(1, 40), range(40, count)):
        some.fill_(-1)
        some[rows.start : rows.stop] = destination[rows.start : rows.stop]
        graph.replay()
    assert torch.equal(caches[0].code_pages, caches[1].code_pages)


def test_omp_encode_from_the_tail_is_the_same_code():
    it = layout()
    caches = [poisoned_cache(it, 12, atoms=N, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    key, value = vectors_like_the_dictionary(P, caches[0])
    slots = torch.arange(P, device="cuda") + it.tail_tokens
    destination = torch.arange(P, device="cuda") + 9 * P
    ops.write_tail(key, value, caches[1], slots)
    ops.omp_encode(key, value, caches[0], torch.arange(P, device="cuda", dtype=torch.int32), destination)
    ops.omp_encode(key[:0], value[:0], caches[1], (-1 - slots).int(), destination)
    assert torch.equal(caches[0].code_pages[9], caches[1].code_pages[9])


@pytest.mark.parametrize(("head_dim", "S"), [(D, 15), (96, 11), (256, 31)])
@pytest.mark.parametrize("quantized", [False, True])
def test_pursue(quantized, head_dim, S):
    """A training step's pursuit: K and V of a layer, whose residual is the vector minus the code, and no worse."""
    cache = poisoned_cache(layout(S=S, Hk=1, head_dim=head_dim), 2, atoms=N, dtype=torch.bfloat16, device="cuda")
    pairs = zip(vectors_like_the_dictionary(4096, cache), (cache.key, cache.value), strict=True)
    vectors = torch.stack([((x.float() - book.mean) / book.stretch).squeeze(1) for x, book in pairs])
    atoms = torch.cat((cache.key.atoms, cache.value.atoms))
    levels = torch.stack((cache.key.levels, cache.value.levels)) if quantized else None
    _, _, want = reference.pursue(vectors, atoms, S, levels)
    indices, coefficients, residual = ops.pursue(vectors, atoms, S, levels)
    for group in range(2):
        code = torch.einsum("ms,msd->md", coefficients[group], atoms[group, indices[group].long()].float())
        assert (residual[group] - (vectors[group] - code)).abs().max() < 1e-4 * vectors[group].norm(dim=1).max()
        assert residual[group].square().sum() <= OMP_ENERGY_RATIO["many"] * want[group].square().sum()
    again = ops.pursue(vectors, atoms, S, levels)
    assert all(torch.equal(*pair) for pair in zip(again, (indices, coefficients, residual), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("codec", "S"), CODES)
def test_sparse_decode(codec, S, dtype):
    lengths = [1, P - 1, P, P + 1, 1000, 4097, 8192]
    problem = random_problem(
        layout(codec, S, dtype), lengths, atoms=N, dtype=dtype, device="cuda", raw_tokens=200 if S == 15 else None
    )
    query = torch.randn(len(lengths), HQ, D, device="cuda", dtype=dtype)
    args = (query, problem.cache, problem.tables, cuda(range(len(lengths))), cuda(lengths))
    want, want_lse = reference.sparse_decode(*args, scale=SCALE)
    for module in (ops, decode):
        out, lse = module.sparse_decode(*args, scale=SCALE, out=torch.full_like(query, torch.nan))
        assert_close(out, want, "attention", dtype)
        assert_close(lse, want_lse, "lse", dtype)


@pytest.mark.parametrize(
    ("group", "head_dim", "S", "atoms", "block_tokens"),
    [
        (1, 128, (15, 7), 1024, 64),
        (2, 64, (11, 11), 4096, 128),
        (4, 128, (15, 15), 4096, 128),
        (4, 96, (16, 14), 1000, 128),  # records with a last halfword
        (3, 64, (5, 6), 333, 32),
        (6, 128, (7, 7), 4096, 128),
        (7, 64, (15, 15), 4096, 128),
        (8, 128, (23, 31), 4096, 256),
        (12, 128, (15, 15), 4096, 128),  # more heads than one pass serves
        (16, 128, (15, 15), 4096, 128),  # Nemotron 3 Nano
        (4, 80, (9, 9), 4096, 128),
        (2, 112, (13, 13), 4096, 128),
        (8, 192, (23, 23), 4096, 128),
        (4, 256, (15, 15), 4096, 128),  # Gemma 3 270M
        (6, 256, (31, 15), 4096, 128),  # Qwen3.5-27B
        (8, 256, (31, 31), 4096, 128),  # Qwen3-Next
    ],
)
def test_decode_through_lookups(group, head_dim, S, atoms, block_tokens):
    """Every shape of the CUDA C++ kernel, contexts of one and of several parts; alone and in a batch, the same bits."""
    it = CodeLayout(head_dim, 2, *S, block_tokens=block_tokens)
    lengths = [1, 63, block_tokens - 1, block_tokens, block_tokens + 1, 1000, 4300, 9000, 0]
    problem = random_problem(it, lengths, atoms=atoms, dtype=torch.bfloat16, device="cuda", raw_tokens=100)
    query = 3 * torch.randn(len(lengths), 2 * group, head_dim, device="cuda", dtype=torch.bfloat16)
    args = (query, problem.cache, problem.tables, cuda(range(len(lengths))), cuda(lengths))
    assert lookup.supports(*args[:3])
    scale = head_dim**-0.5
    want, want_lse = reference.sparse_decode(*args, scale=scale)
    out, lse = lookup.sparse_decode(*args, scale=scale, out=torch.full_like(query, torch.nan))
    assert_close(out, want, "attention", torch.bfloat16)
    assert_close(lse, want_lse, "lse", torch.bfloat16)
    for t in (5, 7):
        rows = slice(t, t + 1)
        alone = lookup.sparse_decode(query[rows], *args[1:3], args[3][rows], args[4][rows], scale=scale)
        assert all(torch.equal(one, many[rows]) for one, many in zip(alone, (out, lse), strict=True))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_decode_through_lookups_in_a_crowd(head_dim):
    """However many tokens a step has, and so columns a program, the same bits."""
    lengths = [300, 9000, 2100, 5000] * 12
    it = CodeLayout(head_dim, 2, 7, 7, block_tokens=P)
    problem = random_problem(it, lengths, atoms=N, dtype=torch.bfloat16, device="cuda", raw_tokens=100)
    query = torch.randn(len(lengths), 8, head_dim, device="cuda", dtype=torch.bfloat16)
    args = (cuda(range(len(lengths))), cuda(lengths))
    cache = (problem.cache, problem.tables)
    whole = lookup.sparse_decode(query, *cache, *args, scale=SCALE)
    for count in (1, 4, 5, 32, 33):
        for first in (0, 15):
            rows = slice(first, first + count)
            some = lookup.sparse_decode(query[rows], *cache, args[0][rows], args[1][rows], scale=SCALE)
            assert all(torch.equal(one, many[rows]) for one, many in zip(some, whole, strict=True))


def test_decode_through_lookups_in_slices(monkeypatch):
    lengths = [5000, 300, 9000]
    problem = random_problem(layout(), lengths, atoms=N, dtype=torch.bfloat16, device="cuda", raw_tokens=100)
    query = torch.randn(3, HQ, D, device="cuda", dtype=torch.bfloat16)
    args = (query, problem.cache, problem.tables, cuda(range(3)), cuda(lengths))
    whole = lookup.sparse_decode(*args, scale=SCALE)
    monkeypatch.setattr(lookup_sizes, "LOOKUP_SCRATCH_BYTES", 1)
    sliced = lookup.sparse_decode(*args, scale=SCALE)
    assert all(torch.equal(one, other) for one, other in zip(whole, sliced, strict=True))


@pytest.mark.parametrize("peak", [1.0, 1e-30, 1e30])
def test_decode_through_lookups_of_any_scale(peak):
    """Fixed point adapts to the values, and one token that takes all the weight is as exact as many that share it."""
    problem = random_problem(layout(), [6000], atoms=N, dtype=torch.bfloat16, device="cuda", raw_tokens=64)
    scales = scale_view(problem.cache.code_pages, problem.cache.layout, "value")
    scales.copy_((peak * torch.rand(*scales.shape[:-1], 1, device="cuda")).bfloat16().view(torch.uint8))
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(1, HQ, D, generator=generator, device="cuda").bfloat16()
    args = (problem.cache, problem.tables, cuda([0]), cuda([6000]))
    key = reference.history(problem.cache, problem.tables, 0, cuda([3000]))[0]
    towards_one = 100 * torch.nn.functional.normalize(key, dim=-1).repeat_interleave(HQ // HK, 1).bfloat16()
    for some in (0 * query, query, towards_one):
        want, want_lse = reference.sparse_decode(some, *args, scale=SCALE)
        out, lse = lookup.sparse_decode(some, *args, scale=SCALE)
        assert_close(out, want, "attention", torch.bfloat16)
        size = max(1.0, float(want_lse.abs().max()) / 20)
        assert_close(lse / size, want_lse / size, "lse", torch.bfloat16)


@pytest.mark.parametrize("group", [4, 6])
def test_decode_through_lookups_of_short_codes(group):
    """Codes that use few of their entries name the null atom with all others, whose bin overflows without harm."""
    problem = random_problem(
        layout(Hk=2), [1500], atoms=N, dtype=torch.bfloat16, device="cuda", sink_pages=0, raw_tokens=0
    )
    clear_entries(problem.cache, "value", 4)
    count = 4096  # each head of each token has one chance in 4,000 to meet a bin that a half cannot hold
    query = torch.randn(count, 2 * group, D, device="cuda", dtype=torch.bfloat16)
    args = (query, problem.cache, problem.tables, cuda([0] * count), cuda([1500] * count))
    want, _ = decode.sparse_decode(*args, scale=SCALE)
    out, _ = lookup.sparse_decode(*args, scale=SCALE)
    assert_close(out, want.float(), "attention", torch.bfloat16)


def test_decode_falls_back(monkeypatch):
    problem = random_problem(layout(), [777], atoms=N, dtype=torch.bfloat16, device="cuda", raw_tokens=100)
    query = torch.randn(1, HQ, D, device="cuda", dtype=torch.bfloat16)
    args = (query, problem.cache, problem.tables, cuda([0]), cuda([777]))
    portable = decode.sparse_decode(*args, scale=SCALE)
    monkeypatch.setattr(nvrtc, "available", lambda _: False)
    assert all(torch.equal(*pair) for pair in zip(ops.sparse_decode(*args, scale=SCALE), portable, strict=True))


@pytest.mark.parametrize("group", [1, 3, 7])
def test_sparse_decode_groups_and_padding(group):
    problem = random_problem(layout(Hk=2), [300, 777], atoms=N, dtype=torch.bfloat16, device="cuda", raw_tokens=150)
    query = torch.randn(5, 2 * group, D, device="cuda", dtype=torch.bfloat16)
    args = (query, problem.cache, problem.tables, cuda([1, 1, 0, 0, 0]), cuda([776, 777, 300, 0, 0]))
    want, want_lse = reference.sparse_decode(*args, scale=SCALE)
    out, lse = ops.sparse_decode(*args, scale=SCALE)
    assert_close(out, want, "attention", torch.bfloat16)
    assert_close(lse, want_lse, "lse", torch.bfloat16)


def test_sparse_decode_is_batch_invariant():
    lengths = [8192, 100, 3000, 8000]
    problem = random_problem(layout(), lengths, atoms=N, dtype=torch.bfloat16, device="cuda", raw_tokens=256)
    query = torch.randn(4, HQ, D, device="cuda", dtype=torch.bfloat16)
    request, seq_len = cuda(range(4)), cuda(lengths)
    together = ops.sparse_decode(query, problem.cache, problem.tables, request, seq_len, scale=SCALE)
    for t in range(4):
        rows = slice(t, t + 1)
        alone = ops.sparse_decode(query[rows], problem.cache, problem.tables, request[rows], seq_len[rows], scale=SCALE)
        assert all(torch.equal(one, many[rows]) for one, many in zip(alone, together, strict=True))


@pytest.mark.parametrize(("codec", "S"), CODES)
def test_reconstruct(codec, S):
    problem = random_problem(
        layout(codec, S), [5000, 300], atoms=N, dtype=torch.bfloat16, device="cuda", raw_tokens=500
    )
    dense = [torch.full((2, 4900 + 250, HK, D), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    args = (problem.cache, problem.tables, cuda([0] * 4900 + [1] * 250), cuda([*range(7, 4907), *range(250)]))
    reference.reconstruct(*args, *dense[0])
    ops.reconstruct(*args, *dense[1])
    assert_close(dense[1], dense[0], "dense", torch.bfloat16)


def test_pages_beyond_two_gigabytes():
    """Pages of both kinds share storage and lie 2^25 bytes apart, so that the last starts far beyond 2^31."""
    it, pages = layout("packed16", 15), 80
    pool = torch.zeros(pages, 1 << 25, dtype=torch.uint8, device="cuda")
    small = poisoned_cache(it, 2, atoms=N, dtype=torch.bfloat16, device="cuda")
    tail = pool.view(torch.bfloat16)[:, : it.tail_page_bytes // 2]
    tail = tail.view(pages, HK, it.tail_tokens, 2, D)
    cache = ops.LayerCache(pool, tail, small.key, small.value, it)
    key, value = vectors_like_the_dictionary(P, cache)
    slots = torch.arange(P, device="cuda") + 65 * it.tail_tokens
    ops.write_tail(key, value, cache, slots)
    ops.omp_encode(key[:0], value[:0], cache, (-1 - slots).int(), torch.arange(P, device="cuda") + 79 * P)
    tables = ops.RequestTables(
        cuda([[79]]), cuda([list(range(65, 65 + P // it.tail_tokens))]), cuda([it.tail_tokens]), cuda([96])
    )
    dense = [torch.full((2, P, HK, D), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    tokens = cuda([0] * P), cuda(range(P))
    reference.reconstruct(cache, tables, *tokens, *dense[0])
    ops.reconstruct(cache, tables, *tokens, *dense[1])
    assert_close(dense[1], dense[0], "dense", torch.bfloat16)
    query = torch.randn(1, HQ, D, device="cuda", dtype=torch.bfloat16)
    args = (query, cache, tables, cuda([0]), cuda([P]))
    want, _ = reference.sparse_decode(*args, scale=SCALE)
    assert_close(ops.sparse_decode(*args, scale=SCALE)[0], want, "attention", torch.bfloat16)


def test_cuda_graph_of_a_decode_step():
    """write_tail, omp_encode and sparse_decode captured once, replayed with other data in the same buffers."""
    it, B, block = layout(), 4, 4
    problem = random_problem(it, [1024] * B, atoms=N, dtype=torch.bfloat16, device="cuda", raw_tokens=512)
    cache, tables = problem.cache, problem.tables
    query = torch.randn(B, HQ, D, device="cuda", dtype=torch.bfloat16)
    key, value = vectors_like_the_dictionary(B, cache)
    slots, source = torch.full((B,), -1, device="cuda"), torch.zeros(B * P, dtype=torch.int32, device="cuda")
    destination = torch.zeros(B * P, dtype=torch.int64, device="cuda")
    request, seq_len, out = cuda(range(B)), cuda([1024] * B), torch.zeros_like(query)

    def step():
        ops.write_tail(key, value, cache, slots)
        ops.omp_encode(key, value, cache, source, destination)
        return ops.sparse_decode(query, cache, tables, request, seq_len, scale=SCALE, out=out)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = step()

    # Now the step writes the last position of each request, and codes the first raw block of request 0.
    R = it.tail_tokens
    slots.copy_(tables.tail_block_table[:, 1023 // R].long() * R + 1023 % R)
    positions = torch.arange(block * P, (block + 1) * P, device="cuda")
    raw_slots = tables.tail_block_table[0, positions // R].long() * R + positions % R
    source[:P] = (-1 - raw_slots).int()
    destination[:P] = tables.block_table[0, block].long() * P + positions % P
    tables.raw_start[0] = (block + 1) * P
    query.normal_()
    graph.replay()
    want, want_lse = reference.sparse_decode(query, cache, tables, request, seq_len, scale=SCALE)
    assert_close(out, want, "attention", torch.bfloat16)
    assert_close(lse, want_lse, "lse", torch.bfloat16)
    last = cache.tail_pages[tables.tail_block_table[:, 1023 // R].long(), :, 1023 % R]
    assert torch.equal(last[:, :, 0], key)
    assert torch.equal(last[:, :, 1], value)


def test_the_papers_codec_is_coded_and_read_by_the_twins():
    """Studies on a GPU have it; engines there refuse it."""
    it = layout("paper", 5, Hk=2)
    caches = [poisoned_cache(it, 3, atoms=64, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    key, value = vectors_like_the_dictionary(20, caches[0])
    source = torch.arange(20, device="cuda", dtype=torch.int32)
    for module, cache in zip((reference, ops), caches, strict=True):
        module.omp_encode(key, value, cache, source, source.long() + P)
    assert torch.equal(caches[0].code_pages, caches[1].code_pages) and not (caches[1].code_pages == 0xFF).all()
