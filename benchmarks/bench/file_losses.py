"""What dictionary files lose on vectors that none of them has seen, all measured with one ruler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lexico_kernels import KV
from lexico_kernels.ops import pursue
from torch import Tensor

from vllm_lexico.dictionary.file import Dictionary


def file_losses(dictionary: Dictionary, ruler: Dictionary, test: Tensor, sparsity: int) -> dict[str, float]:
    """Energy that stored codes lose, mean of the layers.

    An error is divided by the stretch of the ruler, and the energy is that of the vectors about their own mean, so that
    files with other means and stretches can be compared.

    Args:
        dictionary: what codes.
        ruler: a dictionary of the same shape, the same one for all files that are compared.
        test: [layers, 2, tokens, Hk, D], all coded layers.
        sparsity: atoms per vector.

    Returns:
        By kv, squared error over energy.
    """
    layers = dictionary.info.fingerprint.layers
    sums = dict.fromkeys(KV, 0.0)
    for row, layer in enumerate(layers):
        for at, kv in enumerate(KV):
            raw = test[row, at].float()
            dtype = torch.bfloat16 if raw.is_cuda else torch.float32
            book = dictionary.codebook(layer, kv, sparsity, device=raw.device, dtype=dtype)
            unit = ruler.codebook(layer, kv, sparsity, device=raw.device).stretch
            vectors = ((raw - book.mean) / book.stretch).transpose(0, 1).contiguous()
            heads = len(vectors)
            atoms = book.atoms.expand(heads, -1, -1).contiguous()
            residual = pursue(vectors, atoms, sparsity, book.levels.expand(heads, -1).contiguous())[2]
            error = residual.transpose(0, 1) * book.stretch / unit
            energy = ((raw - raw.mean(0)) / unit).square().sum()
            sums[kv] += float(error.square().sum() / energy.clamp(min=1e-20)) / len(layers)
    return sums


def loss_rows(
    dictionaries: Mapping[str, Dictionary], tests: Mapping[str, Tensor], sparsities: Sequence[int]
) -> list[dict[str, Any]]:
    """A row per file, text, sparsity and kv, with its ratio to the first file's, which is the ruler.

    Args:
        dictionaries: by name.
        tests: see `file_losses`, by kind of text.
        sparsities: which.

    Raises:
        ValueError: a dictionary is of a model of another shape.
    """
    names = list(dictionaries)
    ruler = dictionaries[names[0]]
    for name in names[1:]:
        if wrong := ruler.info.fingerprint.differences(dictionaries[name].info.fingerprint):
            raise ValueError(f"{name} and {names[0]} are of different models ({'; '.join(wrong)}); name files of one")
    rows: list[dict[str, Any]] = []
    for text, test in tests.items():
        for sparsity in sparsities:
            lost = {name: file_losses(dictionaries[name], ruler, test, sparsity) for name in names}
            for name in names:
                rows += [
                    {"file": name, "text": text, "sparsity": sparsity, "part": kv, "lost": lost[name][kv],
                     "ratio": lost[name][kv] / lost[names[0]][kv]}
                    for kv in KV
                ]  # fmt: skip
    return rows
