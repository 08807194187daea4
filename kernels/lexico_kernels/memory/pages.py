"""What the operations work on: codebooks, a layer's pages, and where requests' tokens live in them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, int64, tensor, uint8

from lexico_kernels.memory.layout import MAX_ATOMS, NUM_LEVELS, PARTS, CodeLayout

__all__ = ["PARTS", "Codebook", "LayerCache", "LayerStack", "RequestTables"]

# A power of two; no number of a unit vector leaves e4m3's range, and most are far from its subnormal numbers.
SCREEN_SCALE = 256.0


@dataclass(frozen=True)
class Codebook:
    """Decodes one part (K or V) of one layer: vector = mean + stretch * sum of coefficients times atoms.

    Attributes:
        atoms: [H, N, D], model dtype or float32, N <= 4096: unit rows; row 0 is the null atom, zeros. H is Hk, or 1 for
            one dictionary that all heads share; [N, D] may be given for the latter.
        levels: [16] float32, ascending, in [-1, 1]: coefficient = scale * levels[level].
        mean: [Hk, D] float32, taken off a head's vectors before they are coded.
        stretch: [Hk, D] float32, above 0: what a centred vector is divided by, number by number, before it is coded.
            Where it is small an error costs more, so that the code is exact there; 1 everywhere is the plain code.
        screen: [H, N, D] e4m3, SCREEN_SCALE times the atoms, which coding then chooses atoms by (it solves for their
            coefficients with the atoms themselves); or None, and it chooses by the atoms. See `screened`.
        gain: a pursuit's code is shorter than its vector, along which it keeps the share 1 - lost of the energy. Coding
            makes the scale (1 - lost) ** -gain times as large: 0 keeps the nearest code, 1/2 the vector's length, 1 its
            inner product with itself. Decoding knows nothing of it.
    """

    atoms: Tensor
    levels: Tensor
    mean: Tensor
    stretch: Tensor
    screen: Tensor | None = None
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
                    "give one row a KV head of this rank"
                )
        if self.screen is not None and (self.screen.shape != self.atoms.shape or not self.screen.is_contiguous()):
            raise ValueError(
                f"screen of shape {list(self.screen.shape)} beside atoms {list(self.atoms.shape)}; allowed: contiguous "
                "and of one shape; make it by screened()"
            )
        if not 0 <= self.gain <= 1:
            raise ValueError(f"gain is {self.gain}; allowed: 0 to 1; 0 leaves codes as the pursuit finds them")
        if self.stretch.shape != self.mean.shape:
            raise ValueError(
                f"stretch of {self.stretch.shape[0]} heads beside means of {self.mean.shape[0]}; allowed: as many; "
                "slice both to the heads of this rank"
            )
        if self.atoms.shape[0] not in (1, self.mean.shape[0]):
            raise ValueError(
                f"atoms of {self.atoms.shape[0]} heads beside means of {self.mean.shape[0]}; allowed: as many, or one "
                "that all heads share; slice both to the heads of this rank"
            )

    def screened(self) -> "Codebook":
        """The same with a screen, for GPUs that multiply e4m3 (`launch.SCREEN_CAPABILITY`)."""
        return replace(self, screen=(self.atoms.float() * SCREEN_SCALE).to(torch.float8_e4m3fn))

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What decodes: atoms, levels, mean and stretch, as kernels take them."""
        return self.atoms, self.levels, self.mean, self.stretch

    @property
    def num_atoms(self) -> int:
        """N."""
        return self.atoms.shape[1]

    @property
    def head_stride(self) -> int:
        """Numbers from one head's atoms to the next head's: 0 where heads share them."""
        return self.atoms.stride(0) if self.atoms.shape[0] > 1 else 0

    def head(self, index: int) -> "Codebook":
        """The codebook of one head alone."""
        atoms = self.atoms[index] if self.atoms.shape[0] > 1 else self.atoms[0]
        mean, stretch = (rows[index : index + 1] for rows in (self.mean, self.stretch))
        return replace(self, atoms=atoms, mean=mean, stretch=stretch, screen=None)


@dataclass(frozen=True)
class LayerCache:
    """One layer's pages of both kinds and what decodes them.

    Attributes:
        code_pages: uint8 [num_pages, at least page_bytes], stride(1) is 1, stride(0) is free.
        tail_pages: model dtype [num_pages, Hk, R, 2, D], contiguous within a page, stride(0) is free; may share
            storage with code_pages. K is at index 0 of the fourth axis, V at 1.
        key, value: the codebooks.
        layout: sizes and offsets of both.
    """

    code_pages: Tensor
    tail_pages: Tensor
    key: Codebook
    value: Codebook
    layout: CodeLayout

    def __post_init__(self) -> None:
        layout, codes, tail = self.layout, self.code_pages, self.tail_pages
        if codes.dtype != uint8 or codes.ndim != 2 or codes.shape[1] < layout.page_bytes or codes.stride(1) != 1:
            raise ValueError(
                f"code_pages are {codes.dtype} {list(codes.shape)} with strides {codes.stride()}; allowed: uint8 "
                f"[num_pages, {layout.page_bytes} or more] with dense rows; view the cache as bytes"
            )
        R, D = layout.tail_tokens, layout.head_dim
        strides = (R * 2 * D, 2 * D, D, 1)
        # The stride of an axis of length 1 says nothing, and views give it any value.
        axes = zip(tail.shape[1:], tail.stride()[1:], strides, strict=False)
        dense = all(size == 1 or stride == wanted for size, stride, wanted in axes)
        if tail.shape[1:] != (layout.num_kv_heads, R, 2, D) or not dense:
            raise ValueError(
                f"tail_pages are {list(tail.shape)} with strides {tail.stride()}; allowed: [num_pages, "
                f"{layout.num_kv_heads}, {R}, 2, {D}], contiguous within a page; view the cache by its layout"
            )
        if tail.element_size() != layout.element_bytes:
            raise ValueError(
                f"tail_pages are {tail.dtype}; allowed: dtypes of {layout.element_bytes} bytes; "
                "make the layout with the model's element_bytes"
            )

    def codebook(self, part: str) -> Codebook:
        """The codebook of "key" or "value"."""
        return self.key if part == "key" else self.value


@dataclass(frozen=True)
class LayerStack:
    """Layers that one launch codes, alike in all but where their tensors are. Make it with `of`.

    Attributes:
        caches: of the layers, at least one.
        places: int64 [L, 10] on their device, the addresses of each layer's tensors in the order of COLUMNS.
    """

    caches: tuple[LayerCache, ...]
    places: Tensor

    COLUMNS: ClassVar[tuple[str, ...]] = (
        "tail_pages",
        "code_pages",
        *(f"{part}.{field}" for part in PARTS for field in ("atoms", "levels", "mean", "stretch")),
    )

    @classmethod
    def of(cls, caches: Sequence[LayerCache]) -> "LayerStack | None":
        """Stack layers that are alike; None if they are not, or lie where kernels cannot load 16 bytes at once."""
        if len({_kind(cache) for cache in caches}) != 1:
            return None
        places = [[_at(cache, column).data_ptr() for column in cls.COLUMNS] for cache in caches]
        if any(place % 16 for row in places for place in row):
            return None
        return cls(tuple(caches), tensor(places, dtype=int64, device=caches[0].code_pages.device))


def _at(cache: LayerCache, column: str) -> Tensor:
    part, _, field = column.rpartition(".")
    return getattr(cache.codebook(part) if part else cache, field)


def _kind(cache: LayerCache) -> tuple:
    """What layers of a stack have in common."""
    tensors = [_at(cache, column) for column in LayerStack.COLUMNS]
    strides = [pages.stride(0) for pages in tensors[:2]]
    gains = [cache.codebook(part).gain for part in PARTS]
    return cache.layout, *strides, *gains, *((tensor.dtype, tensor.device, tensor.shape) for tensor in tensors)


@dataclass(frozen=True)
class RequestTables:
    """Where each of B requests' tokens live in this step; rows may be padding.

    Positions below sink_end and from raw_start on are raw; those between are codes. Both are multiples of R.

    Attributes:
        block_table: int32 [B, max_pages]; position p of request b is coded in page block_table[b, p // P].
        tail_block_table: int32 [B, max_tail_pages]; position p is raw in page tail_block_table[b, p // R]. Entries
            outside the raw ranges may be stale.
        sink_end: int32 [B].
        raw_start: int32 [B], at least sink_end.
    """

    block_table: Tensor
    tail_block_table: Tensor
    sink_end: Tensor
    raw_start: Tensor
