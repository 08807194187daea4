"""What a cache would give back for K and V vectors: the product's own codes, and the scalar codes it competes with.

A codec is called as `codec(layer, part, vectors [tokens, Hk, D])` and returns what would be read back, of the same
shape and dtype. It adds up the energy that this loses, by layer and part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from lexico_kernels import ops
from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.layout import ENTRY_BYTES, KV, LEVEL_BITS, SCALE_BYTES, CodeLayout
from lexico_kernels.memory.pages import LayerCache, RequestTables
from lexico_kernels.memory.records import load_records
from torch import Tensor

from vllm_lexico.dictionary.file import GAINS, Dictionary

MAX_ROTATION_BITS = 4
LLOYD_STEPS = 2000  # 16 levels settle to six digits


class VectorCodec:
    """Counts what is lost; `read_back` of a subclass codes.

    Attributes:
        vector_bytes: of a coded vector, by part.
        means: float32 [layers, 2, Hk, D] on the device; energy counts from there.
        lost, energy: float64 [layers, 2], squared error and centred energy of all vectors so far.
    """

    vector_bytes: Mapping[str, float]

    def __init__(self, means: Tensor) -> None:
        self.means = means.float()
        self.lost = torch.zeros(means.shape[:2], dtype=torch.float64, device=means.device)
        self.energy = torch.zeros_like(self.lost)

    def __call__(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        """What is read back of `vectors` [tokens, Hk, D] of one part of a layer, counted."""
        read, at = self.read_back(layer, kv, vectors), KV.index(kv)
        self.lost[layer, at] += (read.float() - vectors.float()).square().sum()
        self.energy[layer, at] += (vectors.float() - self.means[layer, at]).square().sum()
        return read

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        raise NotImplementedError

    def energy_lost(self) -> dict[str, float]:
        """Share of the centred energy that was lost, mean of the layers that coded, by part; nan if none did."""
        return dict(zip(KV, (self.lost / self.energy).nanmean(0).tolist(), strict=True))


def dictionary_means(dictionary: Dictionary, device: torch.device | str) -> Tensor:
    """Means of all heads, float32 [layers, 2, Hk, D]; zeros in layers that are not coded."""
    coded = torch.stack([dictionary.tensors[f"{kv}_mean"] for kv in KV], 1)
    shape = dictionary.info.fingerprint
    means = torch.zeros(shape.num_layers, *coded.shape[1:])
    means[list(shape.layers)] = coded.float()
    return means.to(device)


@dataclass
class _Pages:
    """Pages of one part that hold the codes of a call, for reuse; all of `capacity` positions are codes."""

    layout: CodeLayout
    capacity: int
    device: torch.device | str
    dtype: torch.dtype
    code_pages: Tensor = field(init=False)
    tail_pages: Tensor = field(init=False)
    tables: RequestTables = field(init=False)

    def __post_init__(self) -> None:
        layout, count = self.layout, -(-self.capacity // self.layout.block_tokens)
        self.capacity = count * layout.block_tokens
        self.code_pages = torch.zeros(1 + count, layout.page_bytes, dtype=torch.uint8, device=self.device)
        tail_shape = (1, layout.num_kv_heads, layout.tail_tokens, 2, layout.head_dim)
        self.tail_pages = torch.zeros(tail_shape, dtype=self.dtype, device=self.device)
        pages = torch.arange(1, 1 + count, dtype=torch.int32, device=self.device)[None]  # page 0 is never written
        bounds = torch.tensor([[0], [self.capacity]], dtype=torch.int32, device=self.device)
        self.tables = RequestTables(pages, torch.zeros_like(pages), bounds[0], bounds[1])


class DictionaryCodec(VectorCodec):
    """The engine's own path: `omp_encode` lays vectors into code pages, `reconstruct` reads them back.

    dictionary: of the model. device: where vectors will be. key_sparsity, value_sparsity: atoms a vector, 1 to 31.
    codec: "packed16" or "paper". relative_error: where a pursuit stops early; 0 never does. gains: of keys and values,
    see `Codebook`; the product's if None. ValueError as `CodeLayout`.
    """

    def __init__(
        self,
        dictionary: Dictionary,
        device: torch.device | str,
        key_sparsity: int,
        value_sparsity: int,
        codec: str = "packed16",
        relative_error: float = 0.0,
        gains: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(dictionary_means(dictionary, device))
        self.gains = dict(GAINS) if gains is None else dict(zip(KV, gains, strict=True))
        shape = dictionary.info.fingerprint
        self.dictionary, self.device, self.relative_error = dictionary, device, relative_error
        self.layout = CodeLayout(shape.head_dim, shape.num_kv_heads, key_sparsity, value_sparsity, codec)
        self.vector_bytes = {kv: self.layout.vector_bytes(kv) for kv in KV}
        self._books: dict[tuple[int, str, torch.dtype], Codebook] = {}
        self._pages: dict[str, _Pages] = {}

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        """Vectors of one part fill both places of a code page, K's and V's: an encoding takes two sets of vectors.

        With one codebook and sparsity in both places each half gets the records that the engine would store.
        """
        half = -(-len(vectors) // 2)  # of an odd number both halves have the one in the middle
        read = torch.empty_like(vectors)
        if not half:
            return read
        pages, book = self._pages_for(kv, half, vectors.dtype), self._book(layer, kv, vectors.dtype)
        cache = LayerCache(pages.code_pages, pages.tail_pages, book, book, pages.layout)
        source = torch.arange(half, dtype=torch.int32, device=vectors.device)
        destination = source.long() + pages.layout.block_tokens
        ops.omp_encode(vectors[:half], vectors[-half:], cache, source, destination, relative_error=self.relative_error)
        ops.reconstruct(cache, pages.tables, torch.zeros_like(source), source, read[:half], read[-half:])
        return read

    def _pages_for(self, kv: str, tokens: int, dtype: torch.dtype) -> _Pages:
        pages = self._pages.get(kv)
        if pages is None or pages.capacity < tokens or pages.dtype != dtype:
            S, own = self.layout.sparsity(kv), self.layout
            layout = CodeLayout(own.head_dim, own.num_kv_heads, S, S, own.codec, element_bytes=dtype.itemsize)
            pages = self._pages[kv] = _Pages(layout, tokens, self.device, dtype)
        return pages

    def _book(self, layer: int, kv: str, dtype: torch.dtype) -> Codebook:
        name = (layer, kv, dtype)
        if name not in self._books:
            sparsity = self.layout.sparsity(kv)
            book = self.dictionary.codebook(layer, kv, sparsity, device=self.device, dtype=dtype)
            self._books[name] = replace(book, gain=self.gains[kv])
        return self._books[name]


class CountingCodec(DictionaryCodec):
    """A "packed16" codec that counts the atoms its codes have; a page gives each code room for its sparsity.

    used: int64, entries of an atom so far. coded: codes that they are of.
    """

    coded = 0
    used: Tensor | int = 0

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        read = super().read_back(layer, kv, vectors)
        half = -(-len(vectors) // 2)
        if half:
            entries = self._entries(self._pages[kv], half)
            # An entry without an atom is that of atom 0, whatever its level.
            self.used = self.used + (entries & -(1 << LEVEL_BITS) != 0).sum()
            self.coded += entries[..., 0].numel()
        return read

    def mean_atoms(self) -> float:
        """Atoms a vector; nan before the first."""
        return float(self.used) / self.coded if self.coded else math.nan

    def mean_bytes(self) -> float:
        """What a vector would take if a code had no more room than its atoms need."""
        return SCALE_BYTES + ENTRY_BYTES * self.mean_atoms()

    def _entries(self, pages: _Pages, tokens: int) -> Tensor:
        """int16 [tokens, Hk, 2, S]: entries of the pages' first tokens, in both places of the page."""
        slots = torch.arange(tokens, device=self.device) + pages.layout.block_tokens
        records = [load_records(pages.code_pages, pages.layout, kv, slots) for kv in KV]
        return torch.stack(records, 2)[..., SCALE_BYTES:].contiguous().view(torch.int16)


class ByLayer(VectorCodec):
    """A codec of its own for each layer; `vector_bytes` is the mean."""

    def __init__(self, codecs: Sequence[VectorCodec]) -> None:
        super().__init__(codecs[0].means)
        self.codecs = codecs
        self.vector_bytes = {kv: sum(own.vector_bytes[kv] for own in codecs) / len(codecs) for kv in KV}

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        return self.codecs[layer].read_back(layer, kv, vectors)


class RotationCodec(VectorCodec):
    """Random rotation and scalar levels, as TurboQuant: what a cache reaches without looking at the model.

    A vector less its mean is rotated (random signs, then Hadamard) and scaled to unit variance; each number becomes the
    nearest Lloyd-Max level of a Gaussian. One bf16 norm is kept, the one that fits the levels best.

    head_dim: D, a power of two. bits: a number, 1 to 4. means: [layers, 2, Hk, D]; zeros where there are none.
    """

    def __init__(self, head_dim: int, bits: int, means: Tensor) -> None:
        if head_dim < 8 or head_dim & (head_dim - 1):
            raise ValueError(f"head_dim is {head_dim}; a rotation needs a power of two from 8; leave rotations out")
        if not 1 <= bits <= MAX_ROTATION_BITS:
            raise ValueError(f"a rotation of {bits} bits; allowed: 1 to {MAX_ROTATION_BITS}; rotation:2 is the usual")
        super().__init__(means)
        self.vector_bytes = dict.fromkeys(KV, head_dim * bits // 8 + SCALE_BYTES)
        hadamard = torch.ones(1, 1)
        while len(hadamard) < head_dim:
            hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard)
        signs = torch.randint(0, 2, (head_dim, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.rotation = (signs * hadamard / math.sqrt(head_dim)).to(means.device)
        self.levels = gaussian_levels(bits).to(means.device)

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        mean = self.means[layer, KV.index(kv)]
        rotated = (vectors.float() - mean) @ self.rotation
        deviation = rotated.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-20)
        levels = self.levels[torch.bucketize(rotated / deviation, (self.levels[1:] + self.levels[:-1]) / 2)]
        norm = (rotated * levels).sum(-1, keepdim=True) / levels.square().sum(-1, keepdim=True)
        return (levels * norm.bfloat16().float() @ self.rotation.T + mean).to(vectors.dtype)


def gaussian_levels(bits: int) -> Tensor:
    """Lloyd-Max levels of a standard Gaussian: float32 [2 ** bits], ascending, each the mean of its own cell."""
    count = 2**bits
    levels = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(LLOYD_STEPS):
        edges = torch.cat((-infinity, (levels[1:] + levels[:-1]) / 2, infinity))
        density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
        levels = -density.diff() / torch.special.ndtr(edges).diff()
    return levels.float()
