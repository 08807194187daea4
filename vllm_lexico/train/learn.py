"""Learning of atoms, many dictionaries side by side: gradient steps through fixed codes (Lexico, section 3.1).

The step of an atom is its gradient over the energy of its coefficients, the diagonal of the second derivative: where
the paper has one learning rate, an atom that is used ten times as often moves a tenth as far. It leaves less error than
Adam in the same number of steps (docs/log.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lexico_kernels.ops import pursue
from torch.nn.functional import normalize

from vllm_lexico.dictionary.atoms import unit_atoms
from vllm_lexico.train.levels import Levels

MOMENTUM = 0.7
USAGE_MEMORY = 0.9  # of an atom's coefficient energy, from step to step
LEAST_ENERGY = 1e-3  # of the mean atom's energy: what keeps the steps of rare atoms finite
DEAD_SHARE = 0.02  # of the mean atom's use, below which an atom is revived
FIXED_POINT = float(1 << 32)  # steps of a whole number in which squared coefficients, about 1, are added
CODES_BYTES = 1 << 30  # of the dense [G, batch, N] codes held at once


@dataclass(frozen=True)
class LearnSettings:
    """How atoms are learned.

    Args:
        atoms: N, with the null atom.
        atom_bits: of a stored number.
        shared: by all KV heads of a layer, as in the paper; else each has its own.
        sparsity: atoms per vector.
        batch: vectors per step and dictionary.
        rate: of Newton's step, with diagonal curvature.
        key_metric: how far errors of keys are weighted by the queries they meet, 0 for not at all, 1 for the error of
            q.k.
    """

    atoms: int = 4096
    atom_bits: int = 8
    shared: bool = False
    sparsity: int = 10
    batch: int = 8192
    rate: float = 0.5
    key_metric: float = 0.5


def round_atoms(atoms: torch.Tensor, atom_bits: int) -> torch.Tensor:
    """Integers of few bits, each atom's with the best cosine to it among some scales.

    Args:
        atoms: float32 [G, N, D], unit rows.
        atom_bits: 4 or 8.

    Returns:
        int8 [G, N, D].
    """
    top = 2 ** (atom_bits - 1) - 1
    largest = atoms.abs().amax(-1, keepdim=True).clamp(min=1e-20)
    best, best_cosine = torch.zeros_like(atoms), torch.full_like(largest, -1.0)
    # Clipping a few large numbers makes the steps of all the others finer, which pays at few bits.
    for share in (1.0,) if atom_bits == 8 else (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5, 0.4):
        integers = (atoms * (top / (largest * share))).round_().clamp_(-top, top)
        cosine = (normalize(integers, dim=-1) * atoms).sum(-1, keepdim=True)
        best = torch.where(cosine > best_cosine, integers, best)
        best_cosine = torch.maximum(cosine, best_cosine)
    return best.to(torch.int8)


class Learner:
    """G dictionaries that learn together.

    `atoms` are float32 [G, N, D], unit rows, row 0 null; `usage`, float32 [G, N], is how often each was chosen lately.

    Args:
        settings: how atoms are learned.
        groups: G.
        dim: D.
        device: where they are.
    """

    STATE = ("atoms", "momentum", "energy", "usage")

    def __init__(self, settings: LearnSettings, groups: int, dim: int, device: torch.device | str) -> None:
        self.settings = settings
        self.atoms = torch.zeros(groups, settings.atoms, dim, device=device)
        self.momentum = torch.zeros_like(self.atoms)
        self.energy = torch.zeros(groups, settings.atoms, device=device)
        self.usage = torch.zeros_like(self.energy)
        self.steps = 0

    def start_from(self, vectors: torch.Tensor, generator: torch.Generator) -> None:
        """First atoms: random training vectors with a little noise, so that no two are equal.

        Args:
            vectors: [G, M, D].
            generator: on their device.
        """
        groups, rows, dim = vectors.shape
        pick = torch.randint(rows, (self.settings.atoms,), generator=generator, device=vectors.device)
        noise = torch.randn(groups, self.settings.atoms, dim, generator=generator, device=vectors.device)
        self.atoms = normalize(normalize(vectors[:, pick].float(), dim=-1) + 0.1 / math.sqrt(dim) * noise, dim=-1)
        self.atoms[:, 0] = 0

    def step(self, vectors: torch.Tensor, rate: float, levels: Levels | None = None) -> torch.Tensor:
        """One step of all dictionaries (Lexico, section 3.1).

        Args:
            vectors: float32 [G, M, D] of about unit energy.
            rate: of the step.
            levels: with them the code is the stored one, atoms rounded and coefficients quantized, while the unrounded
                atoms move (straight-through), so that what is learned is what is kept.

        Returns:
            The vectors' residual, float32 [G, M, D].
        """
        sparsity = self.settings.sparsity
        used = self.atoms if levels is None else unit_atoms(round_atoms(self.atoms, self.settings.atom_bits))
        if vectors.is_cuda:
            used = used.bfloat16()
        coded = pursue(vectors, used, sparsity, None if levels is None else levels.of(sparsity))
        gradient, energy = self._moments(*coded)
        self.momentum = gradient if self.steps == 0 else torch.lerp(gradient, self.momentum, MOMENTUM)
        self.energy = energy if self.steps == 0 else torch.lerp(energy, self.energy, USAGE_MEMORY)
        floor = LEAST_ENERGY * self.energy.mean(1, keepdim=True)
        self.atoms = normalize(self.atoms + rate * self.momentum / (self.energy + floor)[..., None], dim=-1)
        self.atoms[:, 0] = 0
        self.steps += 1
        return coded[2]

    def _moments(
        self, indices: torch.Tensor, coefficients: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """By atom, means over the batch: of coefficient times residual [G, N, D], and of squared coefficient [G, N].

        The gradient is a product with the dense code matrix: faster than scattered additions on a GPU, and the same on
        every run. So are sums of whole numbers, which the energy is added up in.
        """
        groups, rows, _ = indices.shape
        atoms = self.atoms.shape[1]
        flat = indices.flatten(1).long()
        fixed = (coefficients.flatten(1).square() * FIXED_POINT).long()
        energy = torch.zeros(groups, atoms, dtype=torch.int64, device=flat.device).scatter_add_(1, flat, fixed)
        self.usage += torch.zeros_like(energy).scatter_add_(1, flat, torch.ones_like(flat))
        self.usage[:, 0] = 0
        dtype = torch.bfloat16 if residual.is_cuda else torch.float32
        gradient = torch.empty_like(self.atoms)
        at_once = max(1, CODES_BYTES // (rows * atoms * dtype.itemsize))
        for first in range(0, groups, at_once):
            some = slice(first, first + at_once)
            chosen = indices[some].long()
            codes = torch.zeros(len(chosen), rows, atoms, dtype=dtype, device=residual.device)
            # Column by column: a vector may have an atom twice, and sums in one place come out in any order.
            for one, coefficient in zip(chosen.split(1, 2), coefficients[some].to(dtype).split(1, 2), strict=True):
                codes.scatter_add_(2, one, coefficient)
            gradient[some] = torch.bmm(codes.transpose(1, 2), residual[some].to(dtype)).float() / rows
        return gradient, energy.float() / (FIXED_POINT * rows)

    def revive(self, residual: torch.Tensor) -> int:
        """Atoms hardly used since the last call become directions in which vectors were coded worst.

        Args:
            residual: [G, M, D], of the last step.

        Returns:
            How many did.
        """
        revived = 0
        for group in range(len(self.atoms)):
            dead = self.usage[group] < DEAD_SHARE * self.usage[group].mean()
            dead[0] = False
            index = dead.nonzero().squeeze(1)[: residual.shape[1]]
            worst = residual[group].square().sum(-1).topk(len(index)).indices
            self.atoms[group, index] = normalize(residual[group, worst], dim=-1)
            self.momentum[group, index] = 0
            self.energy[group, index] = self.energy[group].mean()
            revived += len(index)
        self.usage.zero_()
        return revived

    def state(self) -> dict[str, torch.Tensor]:
        """What `load_state` needs to go on, on the CPU."""
        tensors = {name: getattr(self, name).cpu() for name in self.STATE}
        return tensors | {"steps": torch.tensor(self.steps)}

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Go on where `state` was taken."""
        for name in self.STATE:
            setattr(self, name, tensors[name].to(self.atoms.device))
        self.steps = int(tensors["steps"])


def evaluate(
    vectors: torch.Tensor, atoms: torch.Tensor, levels: Levels, sparsities: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Energy that stored codes lose.

    Args:
        vectors: float32 [G, M, D], centred, not seen in training.
        atoms: [G, N, D] as they will be loaded.
        levels: of the coefficients.
        sparsities: which.

    Returns:
        By sparsity, squared error over energy, float32 [G].
    """
    energy = vectors.square().sum((1, 2)).clamp(min=1e-20)
    lost = {}
    for sparsity in sparsities:
        _, _, residual = pursue(vectors, atoms, sparsity, levels.of(sparsity))
        lost[sparsity] = residual.square().sum((1, 2)) / energy
    return lost


def count_usage(vectors: torch.Tensor, atoms: torch.Tensor, sparsity: int) -> torch.Tensor:
    """How often each atom is chosen.

    Args:
        vectors: float32 [G, M, D], centred.
        atoms: [G, N, D] as they will be loaded.
        sparsity: atoms per vector.

    Returns:
        float32 [G, N], the share of all chosen entries; rows sum to 1, or to 0 if nothing is coded.
    """
    indices, _, _ = pursue(vectors, atoms, sparsity)
    groups, size = atoms.shape[:2]
    offsets = torch.arange(groups, device=indices.device)[:, None] * size
    counts = torch.bincount((indices.flatten(1) + offsets).flatten(), minlength=groups * size).view(groups, size)
    counts[:, 0] = 0
    return counts / counts.sum(1, keepdim=True).clamp(min=1)
