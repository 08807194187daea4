"""The codecs that `dictionary_study.py` compares: a trained variant's codes, and what may be done to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from lexico_kernels import KV
from lexico_kernels.ops import pursue
from torch import Tensor

from bench.vector_codecs import VectorCodec

if TYPE_CHECKING:
    from dictionary_study import Trained

Quantizer = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def both(sparsity: int) -> dict[str, int]:
    """The same for K and V."""
    return dict.fromkeys(KV, sparsity)


class StudyCodec(VectorCodec):
    """Codes of one trained variant.

    atoms: [layers * copies, 2, N, D'] for copies = heads and halves that have dictionaries of their own, else 1.
    maps: float32 [layers, 2, Hk, D, D], what vectors are multiplied with before they are coded, or None.
    """

    def __init__(self, trained: Trained, sparsity: dict[str, int], quantize: Quantizer | None = None) -> None:
        super().__init__(trained.means)
        self.trained, self.sparsity, self.quantize = trained, sparsity, quantize or nearest_level
        self.vector_bytes = {kv: 2 * (size + 1) for kv, size in sparsity.items()}

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        trained, at = self.trained, KV.index(kv)
        centred = trained.to_code(vectors.float() - self.means[layer, at], layer, at)
        groups, size = len(centred), trained.copies
        index = slice(layer * size, (layer + 1) * size)
        atoms, levels = trained.atoms[index, at], trained.levels[layer, at]
        pieces = centred.unflatten(0, (size, groups // size)).flatten(1, 2)
        indices, coefficients, _ = pursue(pieces, atoms, self.sparsity[kv] // trained.variant.halves)
        read = []
        for own, book, chosen, table, exact in zip(pieces, atoms, indices, levels, coefficients, strict=True):
            kept = self.quantize(exact, table[self.sparsity[kv] // trained.variant.halves], own, book.float()[chosen])
            code = torch.nn.functional.embedding_bag(chosen, book.float(), per_sample_weights=kept, mode="sum")
            read.append(code)
        back = torch.stack(read).unflatten(1, (groups // size, -1)).flatten(0, 1)
        return (trained.from_code(back, layer, at) + self.means[layer, at]).to(vectors.dtype)


def nearest_level(exact: Tensor, levels: Tensor, vectors: Tensor, atoms: Tensor) -> Tensor:
    """The product's: 16 levels of the largest coefficient's share; zero where it is nearer."""
    scale = exact.abs().amax(1, keepdim=True).bfloat16().float().clamp(min=1e-20)
    return _snap(exact / scale, levels) * scale


def _snap(shares: Tensor, levels: Tensor) -> Tensor:
    near = levels[torch.bucketize(shares, (levels[1:] + levels[:-1]) / 2)]
    return torch.where((near - shares).abs() < shares.abs(), near, 0.0)


def unquantized(exact: Tensor, levels: Tensor, vectors: Tensor, atoms: Tensor) -> Tensor:
    """Coefficients as they are: what levels cost."""
    return exact


def fp8(exact: Tensor, levels: Tensor, vectors: Tensor, atoms: Tensor) -> Tensor:
    """The paper's coefficients (e4m3); 3 S + 2 bytes."""
    scale = exact.abs().amax(1, keepdim=True).clamp(min=1e-20) / 256
    return (exact / scale).to(torch.float8_e4m3fn).float() * scale


def logarithmic(exact: Tensor, levels: Tensor, vectors: Tensor, atoms: Tensor) -> Tensor:
    """Eight magnitudes, each 2 ** -0.6 of the last, and a sign."""
    magnitudes = 2.0 ** (-0.6 * torch.arange(8, device=exact.device))
    return nearest_level(exact, torch.cat((-magnitudes, magnitudes.flip(0))), vectors, atoms)


def _own_levels(column: Tensor, count: int) -> Tensor:
    """So many least-squares levels of these numbers [M] alone, ascending: Lloyd's algorithm from their quantiles."""
    own = torch.quantile(column[:20000], (torch.arange(count, device=column.device) + 0.5) / count)
    for _ in range(12):
        near = torch.bucketize(column, (own[1:] + own[:-1]) / 2)
        total = torch.zeros_like(own).index_add_(0, near, torch.ones_like(column))
        own = torch.where(total > 0, torch.zeros_like(own).index_add_(0, near, column) / total.clamp(min=1), own)
    return own


def by_rank(exact: Tensor, levels: Tensor, vectors: Tensor, atoms: Tensor, count: int = 16) -> Tensor:
    """Levels for each rank of magnitude, learned on the vectors themselves (so it flatters a little)."""
    scale = exact.abs().amax(1, keepdim=True).clamp(min=1e-20)
    order = exact.abs().argsort(1, descending=True)
    shares = (exact / scale).gather(1, order)
    kept = torch.empty_like(shares)
    for rank in range(shares.shape[1]):
        column = shares[:, rank].contiguous()
        own = _own_levels(column, count)
        kept[:, rank] = own[torch.bucketize(column, (own[1:] + own[:-1]) / 2)]
    return torch.zeros_like(exact).scatter_(1, order, kept) * scale


def by_order(exact: Tensor, levels: Tensor, vectors: Tensor, atoms: Tensor) -> Tensor:
    """As `by_rank` by the order in which the pursuit chose, which needs no sorting."""
    scale = exact.abs().amax(1, keepdim=True).bfloat16().float().clamp(min=1e-20)
    shares, kept = exact / scale, torch.empty_like(exact)
    for rank in range(shares.shape[1]):
        column = shares[:, rank].contiguous()
        kept[:, rank] = _snap(column, _own_levels(column, 16))
    return kept * scale


def by_rank3(exact: Tensor, levels: Tensor, vectors: Tensor, atoms: Tensor) -> Tensor:
    """As `by_rank` with 3 bits: what 13 + 3 bits would leave of the coefficients."""
    return by_rank(exact, levels, vectors, atoms, 8)


def refitted(exact: Tensor, levels: Tensor, vectors: Tensor, atoms: Tensor) -> Tensor:
    """Levels chosen one coefficient after another, each against what those before it left, twice."""
    kept = nearest_level(exact, levels, vectors, atoms)
    scale = exact.abs().amax(1).bfloat16().float().clamp(min=1e-20)
    residual = vectors - torch.einsum("ms,msd->md", kept, atoms)
    for _ in range(2):
        for at in range(exact.shape[1]):
            along = kept[:, at] + (residual * atoms[:, at]).sum(1)
            new = _snap(along / scale, levels) * scale
            residual -= (new - kept[:, at])[:, None] * atoms[:, at]
            kept[:, at] = new
    return kept


QUANTIZERS: dict[str, Quantizer] = {
    "unquantized": unquantized,
    "logarithmic": logarithmic,
    "by_rank": by_rank,
    "by_order": by_order,
    "by_rank3": by_rank3,
    "refitted": refitted,
}


class Thresholded(StudyCodec):
    """As many atoms as the relative error asks for, up to 31; `vector_bytes` follows what was used."""

    def __init__(self, trained: Trained, error: float) -> None:
        super().__init__(trained, both(31), unquantized)
        self.error, self.used, self.vectors = error, 0, 0

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        trained, at = self.trained, KV.index(kv)
        own = (vectors.float() - self.means[layer, at]).flatten(0, 1)
        book = trained.atoms[layer, at]
        chosen, kept, _ = pursue(own[None], book[None], 31, relative_error=self.error)
        self.used, self.vectors = self.used + int((chosen > 0).sum()), self.vectors + len(own)
        self.vector_bytes = dict.fromkeys(KV, round(2 * (1 + self.used / self.vectors)))
        code = torch.nn.functional.embedding_bag(chosen[0], book.float(), per_sample_weights=kept[0], mode="sum")
        return (code.view(vectors.shape) + self.means[layer, at]).to(vectors.dtype)


class Adapted(StudyCodec):
    """The paper's adaptive dictionary: the least used atoms give way to vectors that the text itself codes worst."""

    def __init__(self, trained: Trained, sparsity: dict[str, int], fresh: int) -> None:
        super().__init__(trained, sparsity)
        self.fresh = fresh

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        trained, at = self.trained, KV.index(kv)
        own = (vectors.float() - self.means[layer, at]).flatten(0, 1)
        book = trained.atoms[layer, at].clone()
        chosen, _, residual = pursue(own[None], book[None], self.sparsity[kv])
        used = torch.bincount(chosen.flatten(), minlength=len(book))
        used[0] = used.max() + 1
        worst = residual[0].square().sum(1).topk(self.fresh).indices
        book[used.topk(self.fresh, largest=False).indices] = torch.nn.functional.normalize(own[worst]).to(book.dtype)
        indices, exact, _ = pursue(own[None], book[None], self.sparsity[kv])
        levels = trained.levels[layer, at, 0, self.sparsity[kv]]
        kept = nearest_level(exact[0], levels, own, own)
        code = torch.nn.functional.embedding_bag(indices[0], book.float(), per_sample_weights=kept, mode="sum")
        return (code.view(vectors.shape) + self.means[layer, at]).to(vectors.dtype)


class OnlySome(VectorCodec):
    """Another codec for one layer (None: all), some parts and one KV head (None: all), everything else exact."""

    def __init__(
        self, codec: VectorCodec, layer: int | None, parts: tuple[str, ...] = KV, head: int | None = None
    ) -> None:
        super().__init__(codec.means)
        self.codec, self.layer, self.parts, self.head = codec, layer, parts, head
        self.vector_bytes = codec.vector_bytes

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        if kv not in self.parts or self.layer not in (None, layer):
            return vectors
        read = self.codec.read_back(layer, kv, vectors)
        if self.head is None:
            return read
        kept = vectors.clone()
        kept[:, self.head] = read[:, self.head]
        return kept


class Spared(VectorCodec):
    """Another codec, but for the share of tokens of each layer and part that it codes worst."""

    def __init__(self, codec: VectorCodec, share: float) -> None:
        super().__init__(codec.means)
        self.codec, self.share, self.vector_bytes = codec, share, codec.vector_bytes

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        read = self.codec.read_back(layer, kv, vectors)
        error = (read.float() - vectors.float()).square().sum((1, 2))
        worst = error.topk(round(self.share * len(error))).indices
        read[worst] = vectors[worst]
        return read
