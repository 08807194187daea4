"""A coarse copy of a model, which drafts for it: its matrices are rounded to a few bits, and stored as before."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

GROUP = 64  # neighbours in a row that share a scale


def write_rounded_model(model: Path, folder: Path, bits: int) -> Path:
    """Write a copy of a checkpoint with rounded matrices in its layers; embeddings and norms stay as they are.

    Args:
        model: folder of the checkpoint, in safetensors.
        folder: of the copy.
        bits: of a rounded number.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            save_file({name: _rounded(name, one, bits) for name, one in tensors.items()}, folder / file.name)
        elif file.is_file():
            shutil.copy(file, folder / file.name)
    return folder


def _rounded(name: str, tensor: torch.Tensor, bits: int) -> torch.Tensor:
    if tensor.dim() != 2 or ".layers." not in name or tensor.shape[1] % GROUP:
        return tensor
    groups = tensor.float().unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-12) / (2 ** (bits - 1) - 1)
    return ((groups / scale).round() * scale).flatten(1).to(tensor.dtype)
