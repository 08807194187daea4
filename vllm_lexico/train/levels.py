"""Coefficient levels (Lloyd's algorithm) and the error that is left with quantised coefficients."""

import torch
from lexico_kernels.layout import MAX_SPARSITY, NUM_LEVELS

from vllm_lexico.train.omp import Pursuit, pursue, rebuild

BINS = 4096
LLOYD_ROUNDS = 60
CHUNK_VECTORS = 4096  # a group; bounds the bases of a 31-pass pursuit


def learn_levels(vectors: torch.Tensor, atoms: torch.Tensor) -> torch.Tensor:
    """Levels for every sparsity: float32 [G, 32, 16], ascending, in [-1, 1]; row 0 is zeros.

    vectors: float32 [G, M, D], centred. atoms: float32 [G, N, D] as they will be loaded. A level stands for a
    coefficient divided by the largest of its vector. One pursuit of 31 passes serves all sparsities; the shares are
    counted in a histogram, so that the 31 G problems are solved together.
    """
    groups, rows, _ = vectors.shape
    counts = torch.zeros(groups, MAX_SPARSITY, BINS, device=vectors.device)
    for at in range(0, rows, CHUNK_VECTORS):
        pursuit = pursue(vectors[:, at : at + CHUNK_VECTORS], atoms, MAX_SPARSITY)
        for sparsity in range(1, MAX_SPARSITY + 1):
            coefficients, scale = scaled(pursuit, sparsity)
            share = (coefficients / scale.clamp(min=1e-20))[scale.squeeze(-1) > 0].clamp(-1, 1)
            group = torch.arange(groups, device=vectors.device)[:, None].expand(groups, scale.shape[1])
            group = group[scale.squeeze(-1) > 0][:, None].expand_as(share)
            bins = ((share + 1) / 2 * (BINS - 1)).round().long() + group * BINS
            counts[:, sparsity - 1] += torch.bincount(bins.flatten(), minlength=groups * BINS).view(groups, BINS)
    levels = torch.zeros(groups, MAX_SPARSITY + 1, NUM_LEVELS, device=vectors.device)
    levels[:, 1:] = _lloyd(counts.flatten(0, 1)).view(groups, MAX_SPARSITY, NUM_LEVELS)
    return levels


def scaled(pursuit: Pursuit, sparsity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients [G, M, S] and each vector's largest, [G, M, 1], as bfloat16 holds it."""
    coefficients = pursuit.coefficients(sparsity)
    return coefficients, coefficients.abs().amax(-1, keepdim=True).to(torch.bfloat16).float()


def _lloyd(counts: torch.Tensor) -> torch.Tensor:
    """Least-squares levels [K, 16] of K histograms [K, BINS] over [-1, 1].

    Starts from the quantiles of the density's cube root, which is optimal for many levels, and so is not caught by the
    spikes at -1 and 1 (each vector has one coefficient there).
    """
    centres = torch.linspace(-1, 1, BINS, device=counts.device)
    mass = (counts + 1e-6).pow(1 / 3).cumsum(1)
    targets = (torch.arange(NUM_LEVELS, device=counts.device) + 0.5) / NUM_LEVELS * mass[:, -1:]
    levels = centres[torch.searchsorted(mass, targets.contiguous()).clamp(max=BINS - 1)]
    for _ in range(LLOYD_ROUNDS):
        edges = (levels[:, 1:] + levels[:, :-1]) / 2
        nearest = torch.searchsorted(edges.contiguous(), centres.expand_as(counts).contiguous())
        total = torch.zeros_like(levels).scatter_add_(1, nearest, counts)
        moment = torch.zeros_like(levels).scatter_add_(1, nearest, counts * centres)
        levels = torch.where(total > 0, moment / total.clamp(min=1e-6), levels)
    return levels.sort(1).values


def quantise(coefficients: torch.Tensor, scale: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Nearest level times scale: coefficients [G, M, S], scale [G, M, 1], levels [G, 16] -> [G, M, S]."""
    shares = (coefficients / scale.clamp(min=1e-20)).flatten(1)
    nearest = torch.searchsorted((levels[:, 1:] + levels[:, :-1]).contiguous() / 2, shares.contiguous())
    return levels.gather(1, nearest).view_as(coefficients) * scale


def energy_lost(
    vectors: torch.Tensor, atoms: torch.Tensor, levels: torch.Tensor, sparsities: list[int]
) -> dict[int, torch.Tensor]:
    """Squared error over centred energy with quantised coefficients, float32 [G], for each sparsity.

    vectors: float32 [G, M, D], centred, not seen in training. levels: [G, 32, 16].
    """
    lost = {sparsity: torch.zeros(len(vectors), device=vectors.device) for sparsity in sparsities}
    for at in range(0, vectors.shape[1], CHUNK_VECTORS):
        chunk = vectors[:, at : at + CHUNK_VECTORS]
        pursuit = pursue(chunk, atoms, max(sparsities))
        for sparsity in sparsities:
            coefficients = quantise(*scaled(pursuit, sparsity), levels[:, sparsity])
            rebuilt = rebuild(atoms, pursuit.indices[..., :sparsity], coefficients)
            lost[sparsity] += (rebuilt - chunk).square().sum((1, 2))
    energy = vectors.square().sum((1, 2)).clamp(min=1e-20)
    return {sparsity: squares / energy for sparsity, squares in lost.items()}
