"""The codebooks of one attention layer, as buffers of a module of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from lexico_kernels import KV, Codebook
from lexico_kernels.memory.layout import NUM_LEVELS
from lexico_kernels.ops import with_fast_atoms
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

if TYPE_CHECKING:
    from vllm_lexico.serve.setup import LexicoSetup

TENSORS = tuple(field.name for field in fields(Codebook) if field.name != "gain")


class LayerCodebooks(nn.Module):
    """Holds what codes and decodes the keys and the values of a layer.

    Buffers, because sleep mode keeps a model's buffers and memory profiling counts them; not persistent, because no
    checkpoint has them.
    """

    def __init__(self) -> None:
        super().__init__()
        self._gains: dict[str, float] = {}

    def load(self, books: Mapping[str, Codebook]) -> None:
        """Take codebooks over.

        When weights are loaded again the buffers stay where they are: captured CUDA graphs know their addresses.

        Args:
            books: by "key" and "value".
        """
        for kv, book in books.items():
            self._gains[kv] = book.gain
            for name in TENSORS:
                if (values := getattr(book, name)) is not None:
                    self._set(f"{kv}_{name}", values)

    def book(self, kv: str) -> Codebook:
        """The codebook of "key" or "value"; its tensors are this module's buffers."""
        buffers: dict[str, Any] = {name: getattr(self, f"{kv}_{name}", None) for name in TENSORS}
        return Codebook(**buffers, gain=self._gains[kv])

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
) -> dict[str, Codebook]:
    """The codebooks of a layer on this tensor-parallel rank, by "key" and "value".

    Args:
        setup: names the dictionary; without one (the exact codec) codebooks are zeros that nothing reads.
        index: of the layer in the model, which is the dictionary's.
        head_size: D.
        num_kv_heads: Hk, of this rank.
        total_kv_heads: of the model.
        device: where the tensors go.
        dtype: of the atoms.
    """
    dictionary = setup.dictionary()
    if dictionary is None:
        rows = num_kv_heads, head_size
        shapes = (1, head_size), (NUM_LEVELS,), rows, rows
        atoms, levels, mean, stretch = (torch.zeros(shape, device=device) for shape in shapes)
        return dict.fromkeys(KV, Codebook(atoms, levels, mean, stretch))
    heads = heads_of_rank(total_kv_heads, num_kv_heads)
    books = {}
    for kv in KV:
        sparsity = getattr(setup.sparsity_of_layer(index), kv)
        book = dictionary.codebook(index, kv, sparsity, device=device, dtype=dtype, heads=heads)
        books[kv] = with_fast_atoms(book, sparsity)
    return books


def heads_of_rank(total_kv_heads: int, local_kv_heads: int) -> slice:
    """The KV heads of this tensor-parallel rank; where there are more ranks than heads, several hold the same one."""
    rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    first = rank * local_kv_heads if total_kv_heads >= size else rank * total_kv_heads // size
    return slice(first, first + local_kv_heads)
