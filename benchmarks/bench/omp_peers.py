"""Other pursuits over the same vectors: OMP in float64 for quality, two public ones on GPUs for speed.

The public ones are read from folders that the user fetched; nothing of them is kept here.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import torch
from lexico_kernels import reference
from torch import Tensor
from torch.nn.functional import embedding_bag

AUTHORS_CHUNK = 20_000  # vectors, as in their cache_utils.py
# The package holds [vectors, S, N] float32 numbers; so many vectors take 4 GB at S = 15 and N = 4,096.
OMP_GPU_CHUNK = 16_384
FLOAT64_CHUNK = 8192


def float64_energies(vectors: Tensor, atoms: Tensor, sparsity: int, levels: Tensor) -> tuple[float, float]:
    """Residual energy of OMP in float64 over all vectors, as it is and with its coefficients quantized as ours.

    vectors: [M, D], centred. atoms: [N, D]. levels: float32 [16].
    """
    exact = quantized = 0.0
    book = atoms.double()
    for chunk in vectors.double().split(FLOAT64_CHUNK):
        index, coefficients = reference.omp(chunk, book, sparsity)
        exact += residual_energy(chunk, index, coefficients, book)
        index, coefficients = reference.quantized(index, coefficients.float(), levels)
        quantized += residual_energy(chunk, index, coefficients.double(), book)
    return exact, quantized


def residual_energy(vectors: Tensor, index: Tensor, coefficients: Tensor, atoms: Tensor) -> float:
    """Energy of vectors [M, D] minus their codes, all in float64."""
    code = embedding_bag(index, atoms, per_sample_weights=coefficients, mode="sum")
    return float((vectors - code).square().sum())


class Authors:
    """`omp_v0` of krafton-ai/lexico, whose checkout is `folder`: float16, in their chunks.

    The products of atoms are made once, in `prepare`; their `omp` makes them anew for every chunk and a list of every
    vector's code, which is not timed.
    """

    name = "krafton-ai/lexico omp_v0"

    def __init__(self, folder: Path) -> None:
        self.module = _load(folder, "lexico.omp")

    def prepare(self, atoms: Tensor) -> Any:
        """Atoms [N, D] in the form that `code` wants."""
        book = atoms.half().T[None].contiguous()
        return book, torch.bmm(book.transpose(1, 2), book)

    def code(self, book: Any, vectors: Tensor, sparsity: int) -> list[Any]:
        """Codes of vectors [M, D]."""
        chunks = vectors.half().split(AUTHORS_CHUNK)
        return [self.module.omp_v0(book[0], chunk[None], book[1], sparsity)[:2] for chunk in chunks]

    def rebuild(self, atoms: Tensor, codes: list[Any]) -> Tensor:
        """What codes stand for: float32 [M, D]."""
        pieces = [
            embedding_bag(index[0].long(), atoms.float(), per_sample_weights=weights[0, :, :, 0].float(), mode="sum")
            for index, weights in codes
        ]
        return torch.cat(pieces)


class OmpGpu:
    """`run_omp` of the package orthogonal-matching-pursuit-gpu; `folder` is its source or site-packages. float32.

    The products of atoms are part of every call, as its README has it.
    """

    name = "orthogonal-matching-pursuit-gpu"

    def __init__(self, folder: Path) -> None:
        package = "orthogonal_matching_pursuit_gpu"
        try:
            self.module = _load(folder, package)
        except ImportError:
            # Its Cython kernels serve CPUs only; a source that was not built has none, and a GPU needs none.
            for loaded in [module for module in sys.modules if module.startswith(package)]:
                del sys.modules[loaded]
            absent = types.ModuleType(f"{package}.blas_kernels")
            for function in ("argmax_blast", "ppsv", "update_projections_blast", "update_D_mybest_blast"):
                setattr(absent, function, None)
            sys.modules[absent.__name__] = absent
            self.module = _load(folder, package)

    def prepare(self, atoms: Tensor) -> Any:
        """Atoms [N, D] in the form that `code` wants."""
        return atoms.float().T.contiguous()

    def code(self, book: Any, vectors: Tensor, sparsity: int) -> list[Any]:
        """Codes of vectors [M, D]."""
        chunks = vectors.float().split(OMP_GPU_CHUNK)
        return [self.module.run_omp(book, chunk, sparsity, normalize=False, fit_intercept=False) for chunk in chunks]

    def rebuild(self, atoms: Tensor, codes: list[Any]) -> Tensor:
        """What codes stand for: float32 [M, D]."""
        return torch.cat([weights @ atoms.float() for weights in codes])


def _load(folder: Path, module: str) -> types.ModuleType:
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(folder))
