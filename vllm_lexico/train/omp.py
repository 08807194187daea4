"""Orthogonal matching pursuit (Lexico, section 3.2) for training: many dictionaries at once, every prefix kept.

The least-squares solve is a QR factorisation that grows by one column a pass. Beside the orthonormal basis Q of the
chosen atoms A it keeps U with Q = U A, so that the coefficients after any number of passes are one small product: 31
passes give the codes of all 31 sparsities.
"""

from dataclasses import dataclass

import torch

CHUNK_BYTES = 1 << 28  # of the [G, rows, N] correlations held at once


@dataclass(frozen=True)
class Pursuit:
    """Codes of G x M vectors: after t passes, vector = sum of coefficients(t) times atoms[indices[..., :t]]."""

    indices: torch.Tensor  # int64 [G, M, S], in the order of choice
    projections: torch.Tensor  # float32 [G, M, S], on the orthonormal basis
    basis: torch.Tensor  # float32 [G, M, S, S], row j: basis vector j as a combination of the chosen atoms

    def coefficients(self, sparsity: int) -> torch.Tensor:
        """float32 [G, M, sparsity]: least-squares coefficients of the first `sparsity` chosen atoms."""
        projections = self.projections[..., None, :sparsity]
        return (projections @ self.basis[..., :sparsity, :sparsity]).squeeze(-2)


def pursue(vectors: torch.Tensor, atoms: torch.Tensor, sparsity: int) -> Pursuit:
    """OMP of every vector over its group's dictionary.

    vectors: float32 [G, M, D]. atoms: float32 [G, N, D], unit rows or zero rows (never of use, so never chosen with a
    coefficient). sparsity: passes. Memory is bounded: rows are taken in chunks of CHUNK_BYTES of correlations.
    """
    groups, rows, _ = vectors.shape
    # On a GPU the choice needs tensor cores, not precision: a near tie decided either way costs nothing measurable.
    choice = atoms.to(torch.float16 if atoms.is_cuda else atoms.dtype)
    chunk = max(1, CHUNK_BYTES // (groups * atoms.shape[1] * choice.element_size()))
    pieces = [_pursue_chunk(vectors[:, at : at + chunk], atoms, choice, sparsity) for at in range(0, rows, chunk)]
    if len(pieces) == 1:
        return pieces[0]
    return Pursuit(
        torch.cat([piece.indices for piece in pieces], 1),
        torch.cat([piece.projections for piece in pieces], 1),
        torch.cat([piece.basis for piece in pieces], 1),
    )


def _pursue_chunk(vectors: torch.Tensor, atoms: torch.Tensor, choice: torch.Tensor, sparsity: int) -> Pursuit:
    groups, rows, dim = vectors.shape
    norm = vectors.norm(dim=-1, keepdim=True)
    residual = (vectors / norm.clamp(min=1e-20)).reshape(groups * rows, dim)  # unit vectors cannot overflow fp16
    ortho = residual.new_zeros(groups * rows, sparsity, dim)
    basis = residual.new_zeros(groups * rows, sparsity, sparsity)
    projections = residual.new_zeros(groups * rows, sparsity)
    indices = torch.zeros(groups, rows, sparsity, dtype=torch.int64, device=vectors.device)
    first_atom = torch.arange(groups, device=vectors.device)[:, None] * atoms.shape[1]
    flat_atoms, choice = atoms.reshape(-1, dim), choice.transpose(1, 2)
    for step in range(sparsity):
        score = torch.bmm(residual.view(groups, rows, dim).to(choice.dtype), choice).abs_()
        if step:
            score.scatter_(2, indices[..., :step], -1.0)
        index = score.argmax(2)
        indices[..., step] = index
        atom = flat_atoms[(index + first_atom).flatten()]
        along = torch.bmm(ortho[:, :step], atom[:, :, None]) if step else None
        fresh = atom
        if along is not None:
            fresh = atom - torch.bmm(along.transpose(1, 2), ortho[:, :step]).squeeze(1)
        length = fresh.norm(dim=1, keepdim=True)
        inverse = torch.where(length > 1e-4, 1.0 / length, 0.0)  # an atom inside the span (or null) adds nothing
        fresh = fresh * inverse
        ortho[:, step] = fresh
        if along is not None:
            basis[:, step, :step] = -inverse * torch.bmm(along.transpose(1, 2), basis[:, :step, :step]).squeeze(1)
        basis[:, step, step] = inverse.squeeze(1)
        projection = (fresh * residual).sum(1, keepdim=True)
        projections[:, step] = projection.squeeze(1)
        residual = torch.addcmul(residual, projection, fresh, value=-1.0)
    return Pursuit(
        indices, projections.view(groups, rows, sparsity) * norm, basis.view(groups, rows, sparsity, sparsity)
    )


def gather_atoms(atoms: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """atoms [G, N, D], indices int64 [G, M, S] -> [G, M, S, D]."""
    groups, size, dim = atoms.shape
    offsets = torch.arange(groups, device=atoms.device)[:, None, None] * size
    return atoms.reshape(-1, dim)[indices + offsets]


def rebuild(atoms: torch.Tensor, indices: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """Vectors [G, M, D] from codes: atoms [G, N, D], indices and coefficients [G, M, S]."""
    return (coefficients[..., None, :] @ gather_atoms(atoms, indices)).squeeze(-2)
