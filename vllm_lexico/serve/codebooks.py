"""The codebooks of one attention layer, as buffers of a module of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from lexico_kernels import KV, Codebook
from lexico_kernels.memory.layout import NUM_LEVELS
from lexico_kernels.ops import with_fast_atoms
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from vllm_lexico.serve.layer_parts import HeadOrder
from vllm_lexico.serve.setup import LexicoSetup, heads_of

TENSORS = tuple(field.name for field in fields(Codebook) if field.name != "gain")


class LayerCodebooks(nn.Module):
    """Holds what codes and decodes the keys and the values of a layer, for each part of its heads (`layer_parts.py`).

    Buffers, because sleep mode keeps a model's buffers and memory profiling counts them; not persistent, because no
    checkpoint has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._gains: dict[str, float] = {}

    def load(self, books: Mapping[str, Codebook], part: int = 0) -> None:
        """Take the codebooks of a part over.

        When weights are loaded again the buffers stay where they are: captured CUDA graphs know their addresses.

        Args:
            books: by "key" and "value".
            part: of the layer.
        """
        for kv, book in books.items():
            self._gains[f"{kv}_{part}"] = book.gain
            for name in TENSORS:
                if (values := getattr(book, name)) is not None:
                    self._set(f"{kv}_{part}_{name}", values)

    def book(self, kv: str, part: int = 0) -> Codebook:
        """The codebook of "key" or "value" of a part; its tensors are this module's buffers."""
        own = f"{kv}_{part}"
        buffers: dict[str, Any] = {name: getattr(self, f"{own}_{name}", None) for name in TENSORS}
        return Codebook(**buffers, gain=self._gains[own])

    def pairs(self) -> list[tuple[Codebook, Codebook]]:
        """Of keys and values, of each part."""
        return [(self.book("key", part), self.book("value", part)) for part in range(len(self._gains) // len(KV))]

    def load_order(self, kv_heads: Sequence[int], num_heads: int, device: torch.device) -> None:
        """Take over which of the model's KV heads is where, so that the heads of each part lie side by side.

        Args:
            kv_heads: as they shall lie; nothing is kept of them where that is as they do.
            num_heads: Hq.
            device: where the order is kept.
        """
        if list(kv_heads) == sorted(kv_heads):
            return
        order, group = torch.tensor(kv_heads, device=device), torch.arange(num_heads // len(kv_heads), device=device)
        self._set("order_kv_heads", order)
        self._set("order_heads", (order[:, None] * len(group) + group).flatten())

    def order(self) -> HeadOrder | None:
        """What `load_order` took over; None if that is the model's."""
        kept: list[Any] = [getattr(self, f"order_{of}", None) for of in ("kv_heads", "heads")]
        return None if kept[0] is None else HeadOrder(*kept)

    def _set(self, name: str, values: Tensor) -> None:
        present = getattr(self, name, None)
        if present is not None and (present.shape, present.dtype) == (values.shape, values.dtype):
            present.copy_(values)
        else:
            self.register_buffer(name, values, persistent=False)


def layer_books(
    setup: LexicoSetup,
    index: int,
    *,
    head_size: int,
    num_kv_heads: int,
    total_kv_heads: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[tuple[tuple[int, ...], dict[str, Codebook]]]:
    """The parts of a layer on this tensor-parallel rank: KV heads of the rank, and codebooks by "key" and "value".

    Args:
        setup: names the dictionary; without one (the exact codec) codebooks are zeros that nothing reads.
        index: of the layer in the model, which is the dictionary's.
        head_size: D.
        num_kv_heads: Hk, of this rank.
        total_kv_heads: of the model.
        device: where the tensors go.
        dtype: of the atoms.
    """
    dictionary, parts = setup.dictionary(), setup.heads_by_sparsity(index, num_kv_heads)
    if dictionary is None:
        rows = num_kv_heads, head_size
        shapes = (1, head_size), (NUM_LEVELS,), rows, rows
        atoms, levels, mean, stretch = (torch.zeros(shape, device=device) for shape in shapes)
        return [(heads, dict.fromkeys(KV, Codebook(atoms, levels, mean, stretch))) for heads in parts.values()]
    first, found = heads_of_rank(total_kv_heads, num_kv_heads).start, []
    for sparsity, heads in parts.items():
        books = {}
        for kv in KV:
            of_part, own = [first + head for head in heads], getattr(sparsity, kv)
            book = dictionary.codebook(index, kv, own, device=device, dtype=dtype, heads=of_part)
            books[kv] = with_fast_atoms(book, own)
        found.append((heads, books))
    return found


def heads_of_rank(total_kv_heads: int, local_kv_heads: int) -> slice:
    """The KV heads of this tensor-parallel rank."""
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return heads_of(total_kv_heads, local_kv_heads, rank, size)
