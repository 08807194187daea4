"""The torch twins: cases worked by hand, and OMP against scikit-learn."""

import math

import pytest
import torch
from lexico_kernels import Codebook, CodeLayout, reference
from lexico_kernels.memory.layout import MOST_LOST
from lexico_kernels.testing import poisoned_cache, random_problem
from torch.nn.functional import normalize

LEVELS = torch.linspace(-1, 1, 16)


def dictionary(atoms, dim, seed=0):
    rows = normalize(torch.randn(atoms, dim, generator=torch.Generator().manual_seed(seed)), dim=1)
    rows[0] = 0
    return rows


def rebuilt(atoms, indices, coefficients):
    return (coefficients[..., None] * atoms[indices]).sum(1)


def axes(dim=16):
    """Null atom, then the axes."""
    return torch.cat([torch.zeros(1, dim), torch.eye(dim)])


def test_orthogonal_atoms_are_taken_by_size():
    x = torch.zeros(1, 16)
    x[0, 3], x[0, 5], x[0, 7] = 2.0, -3.0, 0.5
    indices, coefficients = reference.omp(x, axes(), 2)
    assert indices.tolist() == [[6, 4]]
    torch.testing.assert_close(coefficients, torch.tensor([[-3.0, 2.0]]))


def test_least_squares_updates_earlier_coefficients():
    atoms = axes()[:3].clone()
    atoms[2] = 0
    atoms[2, :2] = math.sqrt(0.5)
    x = torch.zeros(1, 16)
    x[0, :2] = torch.tensor([2.0, 1.0])
    # (2, 1): the diagonal correlates more (2.12 > 2); then x = 1 * axis + sqrt(2) * diagonal exactly.
    indices, coefficients = reference.omp(x, atoms, 2)
    assert indices.tolist() == [[2, 1]]
    torch.testing.assert_close(coefficients, torch.tensor([[math.sqrt(2), 1.0]]))


def test_pursue_by_hand():
    """Two dictionaries, the second of the axes in reverse; levels a quarter apart, so that 0.6 of 4 becomes 0.5."""
    books = torch.stack((axes(4), axes(4).flip(0).roll(1, 0)))
    vectors = torch.tensor([[4.0, 2.4, 0, 0], [0, 0, 0, 0]]).expand(2, 2, 4)
    indices, coefficients, residual = reference.pursue(vectors, books, 3)
    assert indices.dtype == torch.int32 and indices.tolist() == [[[1, 2, 0], [0] * 3], [[4, 3, 0], [0] * 3]]
    torch.testing.assert_close(coefficients, torch.tensor([[4.0, 2.4, 0], [0] * 3]).expand(2, 2, 3))
    assert residual.abs().max() < 1e-5
    levels = (torch.arange(16) / 4 - 2.75).expand(2, 16)
    indices, coefficients, residual = reference.pursue(vectors, books, 3, levels)
    assert indices[:, 0].tolist() == [[1, 2, 0], [4, 3, 0]]
    torch.testing.assert_close(coefficients, torch.tensor([[4.0, 2.0, 0], [0] * 3]).expand(2, 2, 3))
    torch.testing.assert_close(residual, torch.tensor([[0, 0.4, 0, 0], [0] * 4]).expand(2, 2, 4))


@pytest.mark.parametrize(("atoms", "dim", "sparsity"), [(256, 64, 7), (512, 128, 15), (64, 16, 16)])
def test_residual_energy_is_scikit_learns(atoms, dim, sparsity):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows = dictionary(atoms, dim)
    x = torch.randn(40, dim, generator=torch.Generator().manual_seed(1))
    ours = x - rebuilt(rows, *reference.omp(x, rows, sparsity))
    solution = linear_model.orthogonal_mp(rows[1:].T.double().numpy(), x.T.double().numpy(), n_nonzero_coefs=sparsity)
    theirs = x - (rows[1:].T.double() @ torch.as_tensor(solution)).T
    torch.testing.assert_close(
        ours.double().square().sum(1), theirs.square().sum(1), rtol=1e-4, atol=1e-6 * float(x.square().sum(1).mean())
    )


def test_float64_stays_float64():
    """Of three atoms exactly float64 leaves what float32 cannot."""
    rows = dictionary(100, 64).double()
    rows[1:] = normalize(rows[1:], dim=1)
    x = 3 * rows[[5]] - rows[[7]] + 0.5 * rows[[9]]
    indices, coefficients = reference.omp(x, rows, 4)
    assert coefficients.dtype == torch.float64
    assert (x - rebuilt(rows, indices, coefficients)).norm() < 1e-9


def test_early_stop_leaves_null_atoms():
    x = torch.zeros(2, 16)
    x[0, :3] = torch.tensor([10.0, 1.0, 0.1])
    x[1, :3] = torch.tensor([10.0, 8.0, 6.0])
    indices, coefficients = reference.omp(x, axes(), 3, relative_error=0.15)
    assert indices.tolist() == [[1, 0, 0], [1, 2, 3]]
    assert coefficients[0, 1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_vectors_that_cannot_be_coded_give_zero_records(bad):
    x = torch.randn(3, 16)
    x[1] = 0.0
    x[1, 4] = bad
    records = reference.encode_vectors(x, Codebook(axes(), LEVELS, torch.zeros(1, 16), torch.ones(1, 16)), 5)
    assert (records[1] == 0).all()
    assert (records[[0, 2]] != 0).any(1).all()


def test_huge_and_tiny_vectors():
    x = torch.ones(3, 16) * torch.tensor([[1e30], [1e-30], [3e38]])
    indices, coefficients = reference.omp(x, axes(), 4)
    assert (indices[:2] > 0).all()
    torch.testing.assert_close(coefficients[:2], x[:2, :4])
    assert coefficients.isfinite().all()


def test_duplicate_atoms_do_not_break_the_solve():
    atoms = torch.cat([axes(), axes()[1:], axes()[1:]])
    # Numbers smaller than the residual that ends a pursuit would be left out: one draw of a hundred has one.
    x = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    indices, coefficients = reference.omp(x, atoms, 20)
    torch.testing.assert_close(rebuilt(atoms, indices, coefficients), x, rtol=1e-4, atol=1e-5)
    assert (indices > 0).sum(1).max() <= 16


def test_more_passes_than_useful_code_nothing():
    atoms = dictionary(100, 64)
    x = 3 * atoms[[5, 9]] + atoms[[7, 7]]
    indices, coefficients = reference.omp(x, atoms, 31)
    torch.testing.assert_close(rebuilt(atoms, indices, coefficients), x, rtol=1e-4, atol=1e-4)
    assert (indices > 0).sum(1).max() <= 4
    outside = torch.zeros(1, 16)
    outside[0, 15] = 1.0  # no atom has a part of it
    assert reference.omp(outside, axes()[:9], 3)[0].tolist() == [[0, 0, 0]]


def test_packed16_record_by_hand():
    x = torch.zeros(1, 16)
    x[0, 2], x[0, 8] = -4.0, 1.0
    record = reference.encode_vectors(x, Codebook(axes(), LEVELS, torch.zeros(1, 16), torch.ones(1, 16)), 3)
    scale = torch.tensor([4.0]).bfloat16().view(torch.uint8).tolist()
    # -4 / 4 is level 0; 1 / 4 lies nearest to level 9 (0.2); third entry null. Little endian.
    assert record[0].tolist() == [*scale, 3 << 4 & 0xFF, 3 >> 4, (9 << 4 | 9) & 0xFF, (9 << 4 | 9) >> 8, 0, 0]
    back = reference.decode_vectors(record, Codebook(axes(), LEVELS, torch.zeros(1, 16), torch.ones(1, 16)), 3)
    torch.testing.assert_close(back[0, [2, 8]], torch.tensor([-4.0, 0.8]))


def test_zero_is_a_level_too():
    coefficients, indices = torch.tensor([[1.0, 0.01]]), torch.tensor([[5, 6]])
    kept, levels = reference.quantize(indices, coefficients, torch.ones(1, 1).bfloat16(), LEVELS)
    assert kept.tolist() == [[5, 0]]
    assert levels.tolist() == [[15, 0]]


@pytest.mark.parametrize("codec", ["packed16", "paper"])
def test_codecs_come_near_the_unquantised_code(codec):
    atoms = dictionary(512, 64)
    book = Codebook(atoms, LEVELS, torch.zeros(1, 64), torch.ones(1, 64))
    x = torch.randn(100, 64)
    indices, coefficients = reference.omp(x, atoms, 12)
    full = (x - rebuilt(atoms, indices, coefficients)).square().sum()
    back = reference.decode_vectors(reference.encode_vectors(x, book, 12, codec), book, 12, codec)
    assert (x - back).square().sum() < full + 0.03 * x.square().sum()


@pytest.mark.parametrize("codec", ["packed16", "paper"])
def test_gain_keeps_length_or_inner_product(codec):
    atoms, x = dictionary(512, 64), torch.randn(100, 64, generator=torch.Generator().manual_seed(1))
    fine = torch.linspace(-1, 1, 16)
    backs = {}
    for gain in (0.0, 0.5, 1.0):
        book = Codebook(atoms, fine, torch.zeros(1, 64), torch.ones(1, 64), gain=gain)
        backs[gain] = reference.decode_vectors(reference.encode_vectors(x, book, 12, codec), book, 12, codec)
    kept = (backs[0.0] * x).sum(1) / x.square().sum(1)
    assert kept.mean() < 0.9
    lengths, products = backs[0.5].norm(dim=1) / x.norm(dim=1), (backs[1.0] * x).sum(1) / x.square().sum(1)
    torch.testing.assert_close(lengths.mean(), torch.tensor(1.0), rtol=0, atol=0.02)
    torch.testing.assert_close(products.mean(), torch.tensor(1.0), rtol=0, atol=0.02)


def test_gain_of_the_worst_codes_and_of_the_largest_vectors_is_bounded():
    book = Codebook(axes(), LEVELS, torch.zeros(1, 16), torch.ones(1, 16), gain=1.0)
    x = torch.ones(2, 16)  # of which one atom has a sixteenth
    x[1] = torch.tensor([2e38, 2e38] + [0] * 14)  # and of this a half, so that the scale would be 4e38
    scales = reference.encode_vectors(x, book, 1)[:, :2].clone().view(torch.bfloat16).float()
    torch.testing.assert_close(scales[0, 0], torch.tensor(1 / (1 - MOST_LOST)), rtol=0.01, atol=0)
    assert scales[1, 0] == torch.finfo(torch.bfloat16).max


@pytest.mark.parametrize("gain", [-0.1, 1.5, math.nan])
def test_gains_that_make_no_sense_are_refused(gain):
    with pytest.raises(ValueError, match="allowed: 0 to 1"):
        Codebook(axes(), LEVELS, torch.zeros(1, 16), torch.ones(1, 16), gain=gain)


@pytest.mark.parametrize("codec", ["packed16", "paper", "exact"])
def test_a_token_survives_the_pages(codec):
    layout = CodeLayout(64, 2, 31, 31, codec=codec, block_tokens=32, element_bytes=4)
    cache = poisoned_cache(layout, 9, atoms=4096 if codec == "paper" else 512, dtype=torch.float32)
    key, value = torch.randn(2, 40, 2, 64)
    R = layout.tail_tokens
    slots = torch.arange(8) + R
    reference.write_tail(key[:8], value[:8], cache, slots)
    source = torch.cat([-1 - slots, torch.arange(8, 40)]).int()  # eight from the tail, the others of this batch
    destination = torch.arange(40) + 3 * 32
    destination[20] = 5  # page 0: skipped
    reference.omp_encode(key, value, cache, source, destination)
    tables = random_problem(layout, [40], dtype=torch.float32).tables
    tables.block_table[0, :2] = torch.tensor([3, 4])
    tables.sink_end[0], tables.raw_start[0] = 0, 64
    out_key, out_value = torch.empty(2, 20, 2, 64)
    position = torch.arange(20, dtype=torch.int32)
    reference.reconstruct(cache, tables, torch.zeros_like(position), position, out_key, out_value)
    for dense, exact in ((out_key, key[:20]), (out_value, value[:20])):
        share = (dense - exact).square().sum() / exact.square().sum()
        assert share < (1e-12 if codec == "exact" else 0.3)
    untouched = cache.code_pages[[0, 1, 2, 5, 6, 7, 8]]
    assert (untouched == 0xFF).all()


@pytest.mark.parametrize("sinks", [None, torch.linspace(-1, 4, 6)], ids=["", "sinks"])
@pytest.mark.parametrize("soft_cap", [0.0, 0.7])
def test_attention_is_softmax_over_the_reconstructed_history(soft_cap, sinks):
    layout = CodeLayout(64, 2, 5, 5, block_tokens=32, element_bytes=4)
    problem = random_problem(layout, [50, 0, 33], dtype=torch.float32)
    query = torch.randn(4, 6, 64)
    request, lengths = torch.tensor([2, 0, 0, 1]).int(), torch.tensor([33, 50, 49, 0]).int()
    inputs = (query, problem.cache, problem.tables, request, lengths)
    out, lse = reference.sparse_decode(*inputs, scale=0.1, soft_cap=soft_cap, sinks=sinks)
    key, value = torch.empty(2, 49, 2, 64)
    position = torch.arange(49, dtype=torch.int32)
    reference.reconstruct(problem.cache, problem.tables, torch.zeros_like(position), position, key, value)
    for head in range(6):
        scores = key[:, head // 3] @ query[2, head] * 0.1
        if soft_cap:
            ratio = (2 * scores / soft_cap).exp()
            scores = soft_cap * (ratio - 1) / (ratio + 1)
        torch.testing.assert_close(lse[2, head], scores.logsumexp(0))
        weights = scores if sinks is None else torch.cat([scores, sinks[head : head + 1]])
        torch.testing.assert_close(out[2, head], weights.softmax(0)[:49] @ value[:, head // 3])
    assert (out[3] == 0).all()
    assert (lse[3] == -torch.inf).all()
