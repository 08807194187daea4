"""The product's coding with another stretch of keys than the one that its dictionary was trained with."""

from __future__ import annotations

from dataclasses import replace

import torch
from lexico_kernels.memory.codebook import Codebook
from torch import Tensor
from torch.nn.functional import normalize

from bench.vector_codecs import DictionaryCodec
from vllm_lexico.dictionary.file import Dictionary
from vllm_lexico.train.layer_learners import key_stretch

POWER = 0.5  # of training, `LearnSettings.key_metric`


class RestretchedCodec(DictionaryCodec):
    """Atoms keep their directions, as in training when the stretch changes.

    stretch: float32 [layers, Hk, D] of keys. Others: as `DictionaryCodec`; all layers of the model are coded.
    """

    def __init__(self, dictionary: Dictionary, device: torch.device | str, sparsity: int, stretch: Tensor) -> None:
        super().__init__(dictionary, device, sparsity, sparsity)
        self.stretch = stretch

    def _book(self, layer: int, kv: str, dtype: torch.dtype) -> Codebook:
        book = super()._book(layer, kv, dtype)
        if kv == "value" or torch.equal(book.stretch, self.stretch[layer]):
            return book
        new = self.stretch[layer].contiguous()
        ratio = (book.stretch / new).log()
        if len(book.atoms) == 1:  # shared by all heads
            ratio = ratio.mean(0, keepdim=True)
        atoms = normalize(book.atoms.float() * ratio.exp()[:, None], dim=-1).to(dtype)
        changed = self._books[layer, kv, dtype] = replace(book, atoms=atoms.contiguous(), stretch=new)
        return changed


def paired(energy: Tensor) -> Tensor:
    """Energy [..., D] of numbers that a rotary embedding turns in halves: each gets the mean of its pair."""
    half = energy.shape[-1] // 2
    mean = (energy[..., :half] + energy[..., half:]) / 2
    return torch.cat((mean, mean), -1)


def stretches(own: Tensor, far: Tensor, wanted: set[str]) -> dict[str, Tensor]:
    """Stretches of keys [layers, Hk, D] by name.

    Args:
        own: of the dictionary, made with `POWER`.
        far: energy [layers, Hk, D] of queries that look far back.
        wanted: names: "pairs" of the energy that made `own`, one number per rotary pair; "far" of that energy; "far
            pairs" of both.
    """
    energies = {"pairs": paired(own.pow(-2 / POWER)), "far": far, "far pairs": paired(far)}
    return {name: key_stretch(energies[name], POWER) for name in sorted(wanted)}
