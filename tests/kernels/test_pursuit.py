"""The pursuit kernel against its twin: residuals, never lists of atoms, since ties are legal."""

import pytest
import torch
from lexico_kernels import reference
from lexico_kernels.omp_encode import pursuit
from lexico_kernels.testing import OMP_ENERGY_RATIO
from torch.nn.functional import normalize

# The interpreter has no bfloat16 products; the test marked gpu uses bfloat16.
DTYPE = torch.float16

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, on inf and NaN


def random_books(groups, atoms, D, dtype=DTYPE, device="cpu"):
    """Atoms [G, N, D] with null atoms, and uneven levels [G, 16]."""
    generator = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(groups, atoms, D, generator=generator), dim=-1)
    rows[:, 0] = 0
    levels = torch.linspace(-1, 1, 16) + 0.02 * torch.rand(groups, 16, generator=generator)
    return rows.to(device, dtype), levels.to(device)


def random_vectors(groups, count, D, device="cpu"):
    """Rows of very different length."""
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(groups, count, D, generator=generator)
    return (vectors * 10 ** torch.empty(groups, count, 1).uniform_(-3, 3, generator=generator)).to(device)


def rebuilt(atoms, indices, coefficients):
    chosen = torch.stack([book[own.long()] for book, own in zip(atoms.float(), indices, strict=True)])
    return torch.einsum("gms,gmsd->gmd", coefficients, chosen)


def check(vectors, atoms, S, levels=None, relative_error=0.0):
    """Codes by the kernel, which leave no more than the twin's and whose residual is what they leave."""
    want = reference.pursue(vectors, atoms, S, levels, relative_error=relative_error)
    indices, coefficients, residual = pursuit.pursue(vectors, atoms, S, levels, relative_error=relative_error)
    assert [t.dtype for t in (indices, coefficients, residual)] == [t.dtype for t in want]
    assert [t.shape for t in (indices, coefficients, residual)] == [t.shape for t in want]
    assert ((indices >= 0) & (indices < atoms.shape[1])).all() and not coefficients[indices == 0].any()
    norm = vectors.norm(dim=-1, keepdim=True).clamp(min=1e-20)
    assert ((residual - (vectors - rebuilt(atoms, indices, coefficients))) / norm).abs().max() < 1e-4
    mine, twins = (float((part / norm).square().sum()) for part in (residual, want[2]))
    assert mine <= OMP_ENERGY_RATIO["few"] * twins + 1e-9
    return indices, coefficients, residual


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("count", [1, 63, 64, 65])
def test_sizes(count, quantized, device):
    atoms, levels = random_books(2, 130, 64, device=device)
    check(random_vectors(2, count, 64, device), atoms, 5, levels if quantized else None)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    ("D", "S", "count", "atoms", "dtype"),
    [
        (64, 1, 65, 128, torch.float16),
        (96, 15, 17, 130, torch.float16),
        (128, 31, 1, 200, torch.float16),
        (128, 15, 17, 256, torch.float32),
        (112, 7, 3, 130, torch.float16),
        (256, 9, 3, 200, torch.float16),
        (64, 3, 5, 1, torch.float16),
        (64, 2, 20, 2, torch.float32),
    ],
)
def test_shapes(D, S, count, atoms, dtype, quantized, device):
    rows, levels = random_books(2, atoms, D, dtype, device)
    indices, _, residual = check(random_vectors(2, count, D, device), rows, S, levels if quantized else None)
    if atoms == 1:  # the null atom alone codes nothing
        assert not indices.any()
        torch.testing.assert_close(residual, random_vectors(2, count, D, device))


@pytest.mark.parametrize("quantized", [False, True])
def test_odd_vectors(quantized, device):
    """Zero, NaN, infinite, huge and tiny vectors, and one that a single atom describes, beside an ordinary one."""
    atoms, levels = random_books(1, 40, 64, torch.float32, device)
    vectors = random_vectors(1, 10, 64, device)
    ordinary = vectors[:, 9:].clone()
    vectors[0, 0] = 0
    vectors[0, 1, 3], vectors[0, 2, 3], vectors[0, 3, 3] = float("nan"), float("inf"), float("-inf")
    vectors[0, 4] = 3e38  # its norm is infinite
    vectors[0, 5], vectors[0, 6] = (size * normalize(ordinary[0, 0], dim=0) for size in (1e30, 1e-30))
    vectors[0, 7] = 2 * atoms[0, 7]
    vectors[0, 8] = -3e4 * atoms[0, 8]
    results = pursuit.pursue(vectors, atoms, 6, levels if quantized else None)
    twins = reference.pursue(vectors, atoms, 6, levels if quantized else None)
    alone = pursuit.pursue(ordinary, atoms, 6, levels if quantized else None)
    for tensor, twin, own in zip(results, twins, alone, strict=True):
        assert tensor.isfinite().all() and not tensor[0, :5].any() and not twin[0, :5].any()
        assert torch.equal(tensor[:, 9:], own)  # what stands beside it changes nothing
    indices, coefficients, residual = results
    assert indices[0, 7].tolist() == [7] + [0] * 5 and indices[0, 8].tolist() == [8] + [0] * 5
    torch.testing.assert_close(coefficients[0, 7:9, 0], torch.tensor([2, -3e4], device=device), rtol=2e-2, atol=0)
    for row, size in ((5, 1e30), (6, 1e-30)):
        want = (twins[2][0, row] / size).square().sum()
        assert (residual[0, row] / size).square().sum() <= OMP_ENERGY_RATIO["few"] * want


def test_duplicates_of_atoms(device):
    atoms, levels = random_books(1, 65, 64, torch.float32, device)
    atoms[:, 33:65] = atoms[:, 1:33]
    for given in (None, levels):
        check(random_vectors(1, 20, 64, device), atoms, 16, given)


def test_more_atoms_than_the_vector_needs(device):
    """A vector of three atoms, and fifteen passes: nothing is left, and what is chosen then does no harm."""
    atoms, _ = random_books(1, 200, 64, torch.float32, device)
    vectors = (2 * atoms[:, 5] - atoms[:, 9] + 0.5 * atoms[:, 40])[:, None]
    _, _, residual = check(vectors, atoms, 15)
    assert residual.norm() < 1e-3


def test_stops_at_the_relative_error(device):
    atoms, _ = random_books(2, 200, 64, torch.float32, device)
    vectors = random_vectors(2, 20, 64, device)
    indices, _, residual = check(vectors, atoms, 12, relative_error=0.6)
    share = residual.norm(dim=-1) / vectors.norm(dim=-1)
    assert (share < 0.6 + 1e-4).all() and share.mean() > 0.5
    twins, _, _ = reference.pursue(vectors, atoms, 12, relative_error=0.6)
    assert abs(int((indices > 0).sum()) - int((twins > 0).sum())) <= 2


def test_strided_inputs(device):
    atoms, levels = random_books(4, 100, 64, device=device)
    wide = random_vectors(4, 30, 128, device)
    expected = pursuit.pursue(wide[::2, :, :64].contiguous(), atoms[::2].contiguous(), 4, levels[::2].contiguous())
    given = pursuit.pursue(wide[::2, :, :64], atoms[::2], 4, levels[::2])
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
