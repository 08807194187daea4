"""As much of torchvision as image processors of transformers ask for, where vLLM's build for CPUs has none that loads.

Models that read images cannot be imported without one. This reads images whose size needs no change, which is all that
a test of the cache wants. `image_answers.py` puts the folder onto the path of a process of its own.
"""

import enum
import sys
import types
from typing import Any

import numpy
import torch

__version__ = "0.28.0"


class InterpolationMode(enum.Enum):
    NEAREST_EXACT = "nearest-exact"
    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def pil_to_tensor(image: Any) -> torch.Tensor:
    """uint8 [channels, height, width]."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).contiguous()


def resize(image: torch.Tensor, size: tuple[int, int], **kwargs: Any) -> torch.Tensor:
    """The same image: another size is an error."""
    assert tuple(image.shape[-2:]) == tuple(size), f"an image of {tuple(image.shape)} was to have size {size}"
    return image


def normalize(image: torch.Tensor, mean: Any, std: Any, inplace: bool = False) -> torch.Tensor:
    """Minus the mean of each channel, by its deviation."""
    mean, std = (torch.as_tensor(one, dtype=image.dtype)[:, None, None] for one in (mean, std))
    return (image - mean) / std


def _missing(name: str) -> None:
    """What other image processors import and no test calls is None."""
    if name.startswith("__"):
        raise AttributeError(name)


def _module(name: str, **names: Any) -> types.ModuleType:
    module = sys.modules[f"{__name__}.{name}"] = types.ModuleType(f"{__name__}.{name}")
    vars(module).update(names, __getattr__=_missing)
    return module


io = _module("io")
transforms = _module("transforms", InterpolationMode=InterpolationMode)
transforms.functional = _module("transforms.functional", pil_to_tensor=pil_to_tensor)
transforms.v2 = _module("transforms.v2")
transforms.v2.functional = _module(
    "transforms.v2.functional",
    InterpolationMode=InterpolationMode,
    pil_to_tensor=pil_to_tensor,
    resize=resize,
    normalize=normalize,
)
