"""Codebook: what codes and decodes the keys or the values of one layer."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lexico_kernels.memory.layout import MAX_ATOMS, NUM_LEVELS

# A power of two; no number of a unit vector leaves e4m3's range, and most are far from its subnormal numbers.
FP8_ATOM_SCALE = 256.0
CHUNK = 256  # atoms that `streams.py` takes from memory at a time


@dataclass(frozen=True)
class Codebook:
    """Decodes K or V of one layer: vector = mean + stretch * sum of coefficients times atoms.

    Attributes:
        atoms: [H, N, D], model dtype or float32, N <= 4096: unit rows; row 0 is the null atom, zeros. H is Hk, or 1 for
            one dictionary that all heads share; [N, D] may be given for the latter.
        levels: [16] float32, ascending, in [-1, 1]: coefficient = scale * levels[level].
        mean: [Hk, D] float32, taken off a head's vectors before they are coded.
        stretch: [Hk, D] float32, above 0: what a centred vector is divided by, number by number, before it is coded.
            Where it is small an error costs more, so that the code is exact there; 1 everywhere is the plain code.
        fp8_atoms: [H, N, D] e4m3, FP8_ATOM_SCALE times the atoms, by which coding then chooses atoms (it solves for
            their coefficients with the atoms themselves); or None, and it chooses by the atoms. See `with_fp8_atoms`.
        stream_atoms: uint8 [H, chunks, 256, D], fp8_atoms in the order in which Hopper multiplies them, or None; then
        integers, lengths: int8 [H, N, D] and float32 [H, N], the atoms as integers and what makes those as long again.
            Where they are there, many vectors are coded by them (`streams.py`); see `with_stream_atoms`.
        gain: a pursuit's code is shorter than its vector, along which it keeps the share 1 - lost of the energy. Coding
            makes the scale (1 - lost) ** -gain times as large: 0 keeps the nearest code, 1/2 the vector's length, 1 its
            inner product with itself. Decoding knows nothing of it.

    Raises:
        ValueError: shapes that do not belong together, or a gain out of range.
    """

    atoms: Tensor
    levels: Tensor
    mean: Tensor
    stretch: Tensor
    fp8_atoms: Tensor | None = None
    stream_atoms: Tensor | None = None
    integers: Tensor | None = None
    lengths: Tensor | None = None
    gain: float = 0.0

    def __post_init__(self) -> None:
        if self.atoms.ndim == 2:
            object.__setattr__(self, "atoms", self.atoms[None])
        if self.atoms.ndim != 3 or not 1 <= self.atoms.shape[1] <= MAX_ATOMS or not self.atoms.is_contiguous():
            raise ValueError(
                f"atoms have shape {list(self.atoms.shape)}; allowed: contiguous [H, N, D] with N from 1 to "
                f"{MAX_ATOMS}; train a dictionary of at most that many atoms"
            )
        if self.levels.shape != (NUM_LEVELS,) or not self.levels.is_contiguous():
            raise ValueError(
                f"levels have shape {list(self.levels.shape)}; allowed: [{NUM_LEVELS}]; give the row of one sparsity"
            )
        for name, rows in (("mean", self.mean), ("stretch", self.stretch)):
            if rows.ndim != 2 or rows.shape[1] != self.atoms.shape[2] or not rows.is_contiguous():
                raise ValueError(
                    f"{name} has shape {list(rows.shape)}; allowed: contiguous [Hk, {self.atoms.shape[2]}]; "
                    "give one row per KV head of this rank"
                )
        fp8 = self.fp8_atoms
        if fp8 is not None and (fp8.shape != self.atoms.shape or not fp8.is_contiguous()):
            raise ValueError(
                f"fp8_atoms have shape {list(fp8.shape)}, the atoms {list(self.atoms.shape)}; allowed: contiguous "
                "and of the same shape; make them with with_fp8_atoms()"
            )
        if not 0 <= self.gain <= 1:
            raise ValueError(f"gain is {self.gain}; allowed: 0 to 1; 0 leaves codes as the pursuit finds them")
        if self.stretch.shape != self.mean.shape:
            raise ValueError(
                f"stretch of {self.stretch.shape[0]} heads with means of {self.mean.shape[0]}; allowed: as many; "
                "slice both to the heads of this rank"
            )
        if self.atoms.shape[0] not in (1, self.mean.shape[0]):
            raise ValueError(
                f"atoms of {self.atoms.shape[0]} heads with means of {self.mean.shape[0]}; allowed: as many, or one "
                "that all heads share; slice both to the heads of this rank"
            )

    def with_fp8_atoms(self) -> "Codebook":
        """The same with atoms in fp8, for GPUs that multiply e4m3 (`launch.FP8_CAPABILITY`)."""
        return replace(self, fp8_atoms=(self.atoms.float() * FP8_ATOM_SCALE).to(torch.float8_e4m3fn))

    def with_stream_atoms(self) -> "Codebook":
        """The same with the atoms that `streams.py` codes by, for Hopper; D is 128, and there are atoms in fp8.

        A chunk of stream_atoms is 256 atoms, zeros after the last; of atom n, piece i of 16 numbers stands where
        i ^ (n % 8) says (PTX manual, "128-byte swizzle"). Of a dictionary of 8 bits `integers` are its own, whose
        quarter at most bf16 rounds away.
        """
        assert self.fp8_atoms is not None and self.atoms.shape[2] == 128
        heads, _, size = self.fp8_atoms.shape
        bits = self.fp8_atoms.view(torch.uint8)
        tiles = torch.nn.functional.pad(bits, (0, 0, 0, -bits.shape[1] % CHUNK)).view(heads, -1, 8, size // 16, 16)
        piece, row = (torch.arange(8, device=bits.device) for _ in range(2))
        swizzled = tiles[:, :, row[:, None], piece[None, :] ^ row[:, None]]
        atoms = self.atoms.float()
        integers = (atoms * (127 / atoms.abs().amax(-1, keepdim=True).clamp(min=1e-20))).round()
        return replace(
            self,
            stream_atoms=swizzled.reshape(heads, -1, CHUNK, size),
            integers=integers.to(torch.int8),
            lengths=atoms.norm(dim=-1) / integers.norm(dim=-1).clamp(min=1),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What decodes: atoms, levels, mean and stretch, as kernels take them."""
        return self.atoms, self.levels, self.mean, self.stretch

    @cached_property
    def num_atoms(self) -> int:
        """N."""
        return self.atoms.shape[1]

    @cached_property
    def head_stride(self) -> int:
        """Numbers from one head's atoms to the next head's: 0 where heads share them.

        A head that is alone has atoms of its own, so that kernels are the same for any number of such heads.
        """
        return self.num_atoms * self.atoms.shape[2] if len(self.atoms) == len(self.mean) else 0

    def head(self, index: int) -> "Codebook":
        """The codebook of one head alone, within the same memory."""
        own = slice(index, index + 1)
        of_atoms = slice(None) if self.atoms.shape[0] == 1 else own
        atoms: dict[str, Any] = {
            name: None if (tensor := getattr(self, name)) is None else tensor[of_atoms]
            for name in ("atoms", "fp8_atoms", "stream_atoms", "integers", "lengths")
        }
        return replace(self, mean=self.mean[own], stretch=self.stretch[own], **atoms)
