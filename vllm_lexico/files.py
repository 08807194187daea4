"""Tensors that are written whole or not at all; text and bytes are in `lexico_kernels.files`."""

from collections.abc import Mapping
from pathlib import Path

import torch
from lexico_kernels.files import whole_file
from safetensors import SafetensorError
from safetensors.torch import save_file


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file whole or not at all.

    Raises:
        ValueError: `path` is there and no file.
        OSError: it cannot be written.
    """
    with whole_file(path) as unfinished:
        try:
            save_file(dict(tensors), str(unfinished), metadata=dict(metadata) if metadata else None)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(f"{path} cannot be written ({error}); see that there is room, and write access") from error
