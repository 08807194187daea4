"""Learning of atoms (Lexico, section 3.1): Adam through fixed OMP codes, many dictionaries side by side."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from vllm_lexico.dictionary import unit_atoms
from vllm_lexico.train.omp import gather_atoms, pursue

ROUNDED_SHARE = 0.3  # of the steps, the last ones, are on rounded atoms
REVIVING_SHARE = 0.6  # of the steps, the first ones, revive atoms; later ones would not settle
ADAM_BETAS = (0.9, 0.99)


@dataclass(frozen=True)
class LearnSettings:
    """How atoms are learned. batch: vectors a step and dictionary."""

    atoms: int = 4096  # N, with the null atom
    atom_bits: int = 4
    sparsity: int = 10
    epochs: int = 20
    batch: int = 4096
    learning_rate: float = 1e-2

    def steps_per_epoch(self, vectors: int) -> int:
        return max(1, vectors // self.batch)


def round_atoms(atoms: torch.Tensor, atom_bits: int) -> torch.Tensor:
    """Unit atoms [G, N, D] -> int8 of `atom_bits` with the best cosine to them among some scales."""
    top = 2 ** (atom_bits - 1) - 1
    largest = atoms.abs().amax(-1, keepdim=True).clamp(min=1e-20)
    best, best_cosine = torch.zeros_like(atoms), torch.full_like(largest, -1.0)
    # Clipping a few large numbers makes the steps of all the others finer, which pays at 4 bits.
    for share in (1.0,) if atom_bits == 8 else (1.0, 0.92, 0.84, 0.76, 0.68, 0.6):
        integers = (atoms * (top / (largest * share))).round_().clamp_(-top, top)
        cosine = (normalize(integers, dim=-1) * atoms).sum(-1, keepdim=True)
        best = torch.where(cosine > best_cosine, integers, best)
        best_cosine = torch.maximum(cosine, best_cosine)
    return best.to(torch.int8)


def learn_atoms(
    vectors: torch.Tensor, settings: LearnSettings, seed: int, on_step: Callable[[], object]
) -> torch.Tensor:
    """Integer atoms int8 [G, N, D], row 0 null, of G dictionaries learned at once.

    vectors: float32 [G, M, D], centred. on_step is called after every optimiser step. The last part of training codes
    over the rounded atoms and moves the unrounded ones (straight-through), so what is stored is what was trained.
    """
    groups, rows, _ = vectors.shape
    generator = torch.Generator(device=vectors.device).manual_seed(seed)
    scale = vectors.square().sum(-1).mean(1).sqrt().clamp(min=1e-20)[:, None, None]
    atoms = _initial(vectors, settings.atoms, generator)
    momentum, square = torch.zeros_like(atoms), torch.zeros_like(atoms)
    usage = torch.zeros(groups, settings.atoms, device=vectors.device)
    per_epoch = settings.steps_per_epoch(rows)
    batch, steps = min(settings.batch, rows), settings.epochs * per_epoch
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(rows, generator=generator, device=vectors.device)
        at = step % per_epoch * batch
        chosen = vectors[:, order[at : at + batch]] / scale
        rounded = step >= steps * (1 - ROUNDED_SHARE)
        used = unit_atoms(round_atoms(atoms, settings.atom_bits)) if rounded else atoms
        gradient, residual = _gradient(chosen, used, settings.sparsity, usage)
        gradient -= (gradient * atoms).sum(-1, keepdim=True) * atoms  # along the sphere only: length is fixed
        momentum.lerp_(gradient, 1 - ADAM_BETAS[0])
        square.lerp_(gradient.square(), 1 - ADAM_BETAS[1])
        rate = settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        first, second = (1 - beta ** (step + 1) for beta in ADAM_BETAS)
        atoms = normalize(atoms - rate * (momentum / first) / ((square / second).sqrt() + 1e-12), dim=-1)
        atoms[:, 0] = 0
        if (step + 1) % per_epoch == 0:
            if step < steps * REVIVING_SHARE:
                _revive(atoms, momentum, usage, residual)
            usage.zero_()
        on_step()
    return round_atoms(atoms, settings.atom_bits)


def _initial(vectors: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Random training vectors as first atoms, with a little noise so that no two are equal."""
    groups, rows, dim = vectors.shape
    pick = torch.randint(rows, (size,), generator=generator, device=vectors.device)
    atoms = normalize(vectors[:, pick], dim=-1)
    noise = torch.randn(groups, size, dim, generator=generator, device=vectors.device)
    atoms = normalize(atoms + 0.1 / math.sqrt(dim) * noise, dim=-1)
    atoms[:, 0] = 0
    return atoms


def _gradient(
    vectors: torch.Tensor, atoms: torch.Tensor, sparsity: int, usage: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient [G, N, D] of half the mean squared error by the atoms with codes held fixed, and the residual [G, M, D].

    Adds to usage [G, N] how often each atom was chosen. The sum over a batch is a product with the dense code matrix:
    faster than scattered additions on a GPU, and the same on every run.
    """
    groups, rows, _ = vectors.shape
    pursuit = pursue(vectors, atoms, sparsity)
    coefficients = pursuit.coefficients(sparsity)
    residual = vectors - (coefficients[..., None, :] @ gather_atoms(atoms, pursuit.indices)).squeeze(-2)
    dtype = torch.bfloat16 if vectors.is_cuda else torch.float32
    codes = torch.zeros(groups, rows, atoms.shape[1], dtype=dtype, device=vectors.device)
    codes.scatter_(2, pursuit.indices, coefficients.to(dtype))
    usage.scatter_add_(1, pursuit.indices.flatten(1), torch.ones_like(coefficients).flatten(1))
    gradient = torch.bmm(codes.transpose(1, 2), residual.to(dtype)).float() / -rows
    return gradient, residual


def _revive(atoms: torch.Tensor, momentum: torch.Tensor, usage: torch.Tensor, residual: torch.Tensor) -> None:
    """Atoms hardly used in an epoch become directions in which vectors were coded worst; in place."""
    for group in range(len(atoms)):
        dead = usage[group] < 0.02 * usage[group].mean()
        dead[0] = False
        index = dead.nonzero().squeeze(1)[: len(residual[group])]
        worst = residual[group].square().sum(-1).topk(len(index)).indices
        atoms[group, index] = normalize(residual[group, worst], dim=-1)
        momentum[group, index] = 0
