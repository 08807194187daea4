"""Each Triton kernel against its twin at small, awkward sizes, in poisoned memory."""

import pytest
import torch
from lexico_kernels import CodeLayout, RequestTables, reference
from lexico_kernels import reconstruct as history
from lexico_kernels import write_tail as tail
from lexico_kernels.device.launch import DECODE_SPLITS
from lexico_kernels.omp_encode import tiles as omp
from lexico_kernels.sparse_decode import portable as decode
from lexico_kernels.testing import (
    assert_close,
    check_encode,
    check_gain,
    entries_at,
    fp8_cache,
    fused_tokens,
    poisoned_cache,
    random_problem,
    residual_energy,
)

P = 64
SIZES = [1, 31, P - 1, P, P + 1]
# The interpreter has no bfloat16 products; the tests marked gpu use bfloat16.
DTYPE = torch.float16
POISON = float("nan")

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, on inf and NaN


def layout(D=64, Hk=2, S=(5, 4), **kwargs):
    return CodeLayout(D, Hk, *S, block_tokens=P, **kwargs)


def tokens(count, it, dtype=DTYPE, device="cpu"):
    return fused_tokens(count, it, dtype, device)


def stretch(request, start, stop, device):
    """Request and position of every token of a stretch."""
    position = torch.arange(start, stop, dtype=torch.int32, device=device)
    return torch.full_like(position, request), position


def same_bits(a, b):
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def queries(count, heads, it, dtype=DTYPE, device="cpu"):
    return torch.randn(count, heads, it.head_dim, generator=torch.Generator().manual_seed(9)).to(device, dtype)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_write_tail(count, D, device):
    it = layout(D, S=(D // 12, 4))  # a page has room for a raw token
    caches = [poisoned_cache(it, 70, atoms=16, dtype=DTYPE, device=device) for _ in range(2)]
    key, value = tokens(count, it, device=device)
    slots = torch.randperm(69 * it.tail_tokens, generator=torch.Generator().manual_seed(1))[:count] + it.tail_tokens
    slots[::5] = torch.tensor([-1, 0, it.tail_tokens - 1]).repeat(count)[: len(slots[::5])]  # to be skipped
    reference.write_tail(key, value, caches[0], slots.to(device))
    tail.write_tail(key, value, caches[1], slots.to(device))
    assert same_bits(caches[0].tail_pages, caches[1].tail_pages)


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize("codec", ["packed16", "exact"])
def test_omp_encode(codec, count, device):
    check_encode(omp.omp_encode, layout(codec=codec), count, device)


@pytest.mark.parametrize(
    ("D", "S", "dtype", "atoms"),
    [
        (128, (7, 3), torch.float16, 256),
        (64, (1, 1), torch.float16, 64),
        (64, (9, 17), torch.float32, 130),
        (96, (4, 5), torch.float16, 100),
        (80, (7, 4), torch.float16, 130),
        (192, (17, 5), torch.float16, 130),
        (256, (4, 31), torch.float16, 200),
        (64, (3, 3), torch.float16, 1),
    ],
)
def test_omp_encode_shapes(D, S, dtype, atoms, device):
    heads = 3 if D <= 128 else 1  # the interpreter is slow
    check_encode(omp.omp_encode, layout(D, heads, S, element_bytes=dtype.itemsize), 11, device, dtype, atoms)


@pytest.mark.parametrize(
    ("D", "Hk", "S", "atoms", "count"),
    [(64, 2, (5, 4), 200, 33), (128, 2, (7, 3), 130, 33), (256, 1, (11, 9), 300, 11)],
)
def test_omp_encode_chooses_by_fp8_atoms(D, Hk, S, atoms, count, device):
    check_encode(omp.omp_encode, layout(D, Hk, S), count, device, atoms=atoms, with_fp8_atoms=True)


def test_gain(device):
    check_gain(omp.omp_encode, layout(64, 2, (8, 5)), device, torch.float16, 200)


def test_fp8_atoms_are_what_atoms_are_chosen_by_and_nothing_else(device):
    """Where one atom alone has a copy in fp8, all codes are it, with the coefficient that the atom itself gives."""
    it = layout(64, 2, (1, 1))
    cache = fp8_cache(poisoned_cache(it, 3, atoms=40, dtype=DTYPE, device=device))
    for book in (cache.key, cache.value):
        book.fp8_atoms[:, :7], book.fp8_atoms[:, 8:] = 0, 0
    key, value = tokens(20, it, device=device)
    destination = torch.arange(20, device=device) + P
    omp.omp_encode(key, value, cache, torch.arange(20, device=device, dtype=torch.int32), destination)
    for kv, vectors in (("key", key), ("value", value)):
        book = cache.codebook(kv)
        centred = (vectors.float() - book.mean) / book.stretch
        atom = book.atoms[:, 7].float()
        along = (centred * atom).sum(-1)
        want = (centred - along[..., None] * atom).square().sum(-1)
        got = residual_energy(cache, destination, vectors, kv).float()
        # One coefficient's scale in bf16, and its level, near 1 but not at it.
        assert (got - want <= 0.01 * along.square() + 1e-3 * want).all()


def test_omp_encode_stops_early(device):
    it = layout(64, 2, (12, 12))
    caches = check_encode(omp.omp_encode, it, 20, device, relative_error=0.6)
    used = []
    for cache in caches:
        slots = torch.arange(2 * P + 5, 2 * P + 9, device=device)
        used.append(int((entries_at(cache, slots, "key") != 0).sum()))
    assert 0 < used[1] < 8 * 12
    assert abs(used[0] - used[1]) <= 2


def test_omp_encode_odd_vectors(device):
    """Zero, NaN, infinite, huge and tiny vectors, and some that a single atom describes."""
    it = layout(64, 2, (6, 6), element_bytes=4)
    cache = poisoned_cache(it, 4, atoms=64, dtype=torch.float32, device=device)
    key = torch.zeros(10, 2, 64, device=device)
    key[0, 0, 3], key[1, 0, 3], key[2, 0, 3] = float("nan"), float("inf"), float("-inf")
    key[3], key[4] = 3e38, 1e30
    key[5] = 2 * cache.key.atoms[:, 7] * cache.key.stretch + cache.key.mean
    key[6] = cache.key.mean
    key[7] = cache.key.mean + 1e-30
    destination = torch.arange(10, device=device) + P
    omp.omp_encode(key, key, cache, torch.arange(10, device=device, dtype=torch.int32), destination)
    tables = RequestTables(*(torch.tensor(x, dtype=torch.int32, device=device) for x in ([[1]], [[0] * P], [0], [P])))
    out_key, out_value = torch.full((2, 10, 2, 64), POISON, device=device)
    reference.reconstruct(cache, tables, *stretch(0, 0, 10, device), out_key, out_value)
    for token, head in ((0, 0), (1, 0), (2, 0), (6, 0), (6, 1)):
        torch.testing.assert_close(out_key[token, head], cache.key.mean[head])
    assert out_key.isfinite().all()
    torch.testing.assert_close(out_key[5], key[5], rtol=1e-2, atol=1e-2)
    first = entries_at(cache, destination[5:6], "key")
    assert ((first != 0).sum(-1) == 1).all()  # one atom, then nothing is left to code


def test_omp_encode_duplicate_atoms(device):
    it = layout(64, 1, (16, 16), element_bytes=4)
    cache = poisoned_cache(it, 4, atoms=65, dtype=torch.float32, device=device)
    for book in (cache.key, cache.value):
        book.atoms[:, 33:65] = book.atoms[:, 1:33]
    key, value = tokens(20, it, torch.float32, device)
    destination = torch.arange(20, device=device) + P
    omp.omp_encode(key, value, cache, torch.arange(20, device=device, dtype=torch.int32), destination)
    centred = (key.float() - cache.key.mean) / cache.key.stretch
    energy = residual_energy(cache, destination, key, "key")
    assert (energy <= centred.square().sum(-1) * 1.001).all()


def test_omp_encode_skips_everything(device):
    it = layout()
    cache = poisoned_cache(it, 3, atoms=64, dtype=DTYPE, device=device)
    key, value = tokens(5, it, device=device)
    nowhere = torch.tensor([-1, 0, P - 1, -5, 3], device=device)
    omp.omp_encode(key, value, cache, torch.full((5,), -9999, dtype=torch.int32, device=device), nowhere)
    omp.omp_encode(key[:0], value[:0], cache, torch.zeros(0, dtype=torch.int32, device=device), nowhere[:0])
    assert (cache.code_pages == 0xFF).all()


def check_decode(problem, request, lengths, heads, device, dtype=DTYPE, soft_cap=0.0, sinks=None):
    request = torch.tensor(request, dtype=torch.int32, device=device)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    query = queries(len(lengths), heads, problem.cache.layout, dtype, device)
    args = (query, problem.cache, problem.tables, request, lengths)
    scale = problem.cache.layout.head_dim**-0.5
    want, want_lse = reference.sparse_decode(*args, scale=scale, soft_cap=soft_cap, sinks=sinks)
    out = torch.full((*query.shape[:2], 2 * query.shape[2]), POISON, dtype=dtype, device=device)[..., : query.shape[2]]
    given, lse = decode.sparse_decode(*args, scale=scale, out=out, soft_cap=soft_cap, sinks=sinks)
    assert given is out
    assert_close(out, want, "attention", dtype)
    assert_close(lse, want_lse, "lse", dtype)


@pytest.mark.parametrize("codec", ["packed16", "exact"])
@pytest.mark.parametrize("group", [1, 3, 7])
def test_sparse_decode(codec, group, device):
    it = layout(codec=codec)
    problem = random_problem(it, SIZES, dtype=DTYPE, device=device)
    check_decode(problem, range(5), SIZES, 2 * group, device)


@pytest.mark.parametrize(
    ("D", "S", "dtype"),
    [
        (128, (7, 3), torch.float16),
        (96, (4, 5), torch.float16),
        (64, (9, 17), torch.float32),
        (80, (9, 9), torch.float16),
        (192, (11, 23), torch.float16),
        (256, (31, 15), torch.float16),
    ],
)
def test_sparse_decode_shapes(D, S, dtype, device):
    it = layout(D, 1, S, element_bytes=dtype.itemsize)
    problem = random_problem(it, [70], dtype=dtype, device=device)
    check_decode(problem, [0], [70], 2, device, dtype)


@pytest.mark.parametrize("codec", ["packed16", "exact"])
def test_sparse_decode_with_a_soft_cap(codec, device):
    problem = random_problem(layout(codec=codec), [70], device=device)
    check_decode(problem, [0], [70], 4, device, soft_cap=0.7)


def test_sparse_decode_beside_learned_sinks(device):
    problem = random_problem(layout(), [70], dtype=DTYPE, device=device)
    sinks = torch.linspace(-2, 6, 6).to(device, torch.bfloat16)
    check_decode(problem, [0, 0, 0], [70, 3, 0], 6, device, sinks=sinks)


def test_sparse_decode_several_tokens_of_a_request_and_padding(device):
    problem = random_problem(layout(), [40, 63], device=device, raw_tokens=20)
    check_decode(problem, [1, 1, 1, 0, 0], [61, 62, 63, 40, 0], 6, device)


@pytest.mark.parametrize(("sink_pages", "raw_tokens"), [(0, 0), (0, 500), (3, 0), (1, 1), (50, 0)])
def test_sparse_decode_ranges(sink_pages, raw_tokens, device):
    """No sinks, no tail (its pages are gone after a prefix hit), nothing coded, everything a sink."""
    problem = random_problem(layout(), [63, 33], device=device, sink_pages=sink_pages, raw_tokens=raw_tokens)
    check_decode(problem, [0, 1], [63, 33], 4, device)


def test_sparse_decode_long_context_uses_all_splits(device):
    length = DECODE_SPLITS * 128 + 77
    problem = random_problem(layout(64, 1, (2, 2)), [length], device=device, raw_tokens=40)
    check_decode(problem, [0], [length], 2, device)


def test_sparse_decode_without_tokens(device):
    problem = random_problem(layout(), [5], device=device)
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    out, lse = decode.sparse_decode(
        queries(0, 4, problem.cache.layout, device=device), problem.cache, problem.tables, empty, empty, scale=1.0
    )
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


def test_sparse_decode_is_batch_invariant(device):
    problem = random_problem(layout(), [63, 200, 33], device=device, raw_tokens=40)
    query = queries(3, 4, problem.cache.layout, device=device)
    request, lengths = torch.tensor([[0, 1, 2], [63, 200, 33]], dtype=torch.int32, device=device)
    inputs = (problem.cache, problem.tables)
    together = decode.sparse_decode(query, *inputs, request, lengths, scale=0.2)
    alone = decode.sparse_decode(query[1:2], *inputs, request[1:2], lengths[1:2], scale=0.2)
    for one, many in zip(alone, together, strict=True):
        assert same_bits(one, many[1:2])


@pytest.mark.parametrize("codec", ["packed16", "exact"])
@pytest.mark.parametrize(("start", "stop"), [(0, 1), (0, 63), (5, 5 + P - 1), (P, 2 * P), (30, 31 + P)])
def test_reconstruct(codec, start, stop, device):
    problem = random_problem(layout(codec=codec), [20, 150], device=device, raw_tokens=20)
    dense = [torch.full((2, stop - start, 4, 64), POISON, dtype=DTYPE, device=device)[:, :, ::2] for _ in range(2)]
    args = (problem.cache, problem.tables, *stretch(1, start, stop, device))
    reference.reconstruct(*args, *dense[0])
    history.reconstruct(*args, *dense[1])
    assert_close(dense[1], dense[0], "dense", DTYPE)


@pytest.mark.parametrize(("D", "S"), [(80, (9, 9)), (96, (7, 9)), (128, (7, 9)), (192, (23, 5)), (256, (15, 31))])
def test_reconstruct_shapes(D, S, device):
    problem = random_problem(layout(D, 3, S, element_bytes=4), [50], device=device, dtype=torch.float32)
    dense = [torch.full((2, 50, 3, D), POISON, device=device) for _ in range(2)]
    args = (problem.cache, problem.tables, *stretch(0, 0, 50, device))
    reference.reconstruct(*args, *dense[0])
    history.reconstruct(*args, *dense[1])
    assert_close(dense[1], dense[0], "dense", torch.float32)


def test_reconstruct_of_several_requests(device):
    """Stretches of requests one after another, cut anywhere, with tiles that hold tokens of two of them."""
    problem = random_problem(layout(), [50, 7, 90], device=device, raw_tokens=20)
    pieces = [stretch(0, 3, 50, device), stretch(2, 60, 90, device), stretch(1, 0, 7, device), stretch(2, 0, 9, device)]
    request, position = (torch.cat(kv) for kv in zip(*pieces, strict=True))
    dense = [torch.full((2, len(request), 2, 64), POISON, dtype=DTYPE, device=device) for _ in range(2)]
    history.reconstruct(problem.cache, problem.tables, request, position, *dense[0])
    at = 0
    for piece in pieces:
        rows = slice(at, at := at + len(piece[0]))
        reference.reconstruct(problem.cache, problem.tables, *piece, *dense[1][:, rows])
    assert_close(dense[0], dense[1], "dense", DTYPE)
