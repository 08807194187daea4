"""Coefficient levels: 16 values for each sparsity, by Lloyd's algorithm."""

from dataclasses import dataclass

import torch
from lexico_kernels.memory.layout import MAX_SPARSITY, NUM_LEVELS
from lexico_kernels.ops import pursue

BINS = 4096
LLOYD_ROUNDS = 60
# Levels change smoothly with sparsity: they are learned at these and interpolated between.
LEARNED_SPARSITIES = (1, 2, 3, 4, 5, 7, 9, 11, 13, 15, 19, 23, 27, 31)


@dataclass(frozen=True)
class Levels:
    """Levels of G dictionaries: float32 [G, 32, 16], ascending, in [-1, 1]; row s serves sparsity s, row 0 is zeros."""

    table: torch.Tensor

    def of(self, sparsity: int) -> torch.Tensor:
        """float32 [G, 16]."""
        return self.table[:, sparsity].contiguous()


def learn_levels(
    vectors: torch.Tensor,
    atoms: torch.Tensor,
    sparsities: tuple[int, ...] = LEARNED_SPARSITIES,
    *,
    sharing: int = 1,
) -> Levels:
    """Levels for every sparsity, learned at some and interpolated between.

    A level stands for a coefficient divided by the largest of its vector.

    Args:
        vectors: float32 [G, M, D], centred.
        atoms: [G, N, D] as they will be loaded.
        sparsities: at which levels are learned.
        sharing: so many dictionaries in a row, those of a layer's heads, get the same levels.
    """
    learned = {}
    for sparsity in sparsities:
        counts = _histogram(vectors, atoms, sparsity).unflatten(0, (-1, sharing)).sum(1)
        learned[sparsity] = _lloyd(counts).repeat_interleave(sharing, 0)
    table = torch.zeros(len(vectors), MAX_SPARSITY + 1, NUM_LEVELS, device=vectors.device)
    for sparsity in range(1, MAX_SPARSITY + 1):
        below = max((known for known in sparsities if known <= sparsity), default=min(sparsities))
        above = min((known for known in sparsities if known >= sparsity), default=max(sparsities))
        share = (sparsity - below) / (above - below) if above > below else 0.0
        table[:, sparsity] = torch.lerp(learned[below], learned[above], share)
    return Levels(table)


def _histogram(vectors: torch.Tensor, atoms: torch.Tensor, sparsity: int) -> torch.Tensor:
    """Counts [G, BINS] over [-1, 1] of coefficients over the largest of their vector, which is rounded as stored."""
    indices, coefficients, _ = pursue(vectors, atoms, sparsity)
    scale = coefficients.abs().amax(-1, keepdim=True).to(torch.bfloat16).float()
    share = (coefficients / scale.clamp(min=1e-20)).clamp(-1, 1)
    group = torch.arange(len(vectors), device=vectors.device)[:, None, None]
    bins = ((share + 1) / 2 * (BINS - 1)).round().long() + group * BINS
    counted = (indices > 0) & (scale > 0)
    counts = torch.bincount(bins[counted], minlength=len(vectors) * BINS)
    return counts.view(len(vectors), BINS).float()


def _lloyd(counts: torch.Tensor) -> torch.Tensor:
    """Least-squares levels [K, 16] of K histograms [K, BINS] over [-1, 1].

    Starts from the quantiles of the density's cube root, which is optimal for many levels, and so is not caught by the
    spikes at -1 and 1 (each vector has one coefficient there). Sums over the bins between two edges are differences of
    running sums, which come out the same on every run, as scattered additions on a GPU do not.
    """
    centres = torch.linspace(-1, 1, BINS, device=counts.device, dtype=torch.float64)
    counts = counts.double()
    mass = (counts + 1e-6).pow(1 / 3).cumsum(1)
    targets = (torch.arange(NUM_LEVELS, device=counts.device) + 0.5) / NUM_LEVELS * mass[:, -1:]
    levels = centres[torch.searchsorted(mass, targets.contiguous()).clamp(max=BINS - 1)]
    ends = torch.stack((counts.cumsum(1), (counts * centres).cumsum(1)))
    ends = torch.nn.functional.pad(ends, (1, 0))
    for _ in range(LLOYD_ROUNDS):
        edges = (levels[:, 1:] + levels[:, :-1]) / 2
        at = torch.searchsorted(centres, edges.contiguous())
        at = torch.nn.functional.pad(at, (1, 0))
        at = torch.nn.functional.pad(at, (0, 1), value=BINS)
        total, moment = ends.gather(2, at.expand(2, -1, -1)).diff(dim=-1)
        levels = torch.where(total > 0, moment / total.clamp(min=1e-9), levels)
    return levels.sort(1).values.float()
