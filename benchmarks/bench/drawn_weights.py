"""Weights as a new model draws them, in the place of vLLM's dummy ones, on which not only quality depends.

With `load_format="dummy"` vLLM draws every weight from -0.001 to 0.001. Where the projections of a model have biases,
as those of gpt-oss have, its keys and values are then the biases and hardly anything else: all tokens have one code,
and their values are added up in the same few bins, which no served model does and which takes longer. Used as

    llm = LLM(..., load_format="dummy", **DRAWS)
    llm.collective_rpc("draw_weights")
"""

from __future__ import annotations

import zlib
from typing import Any

import torch

DRAWS = {"worker_extension_cls": f"{__name__}.Draws"}


class Draws:
    """What vLLM's worker gets beside its own methods."""

    def draw_weights(self: Any) -> None:
        """Draw the model's weights anew, in place, so that CUDA graphs read them."""
        draw_weights(self.get_model())


@torch.no_grad()
def draw_weights(model: torch.nn.Module) -> None:
    """Draw all floating-point parameters of two dimensions or more, and set biases to 0 and norms to 1.

    Matrices get a deviation of their last dimension's inverse root, embeddings one of 1. Other vectors stay.
    """
    for path, module in model.named_modules():
        kind = type(module).__name__
        for name, weight in module.named_parameters(recurse=False):
            if not weight.is_floating_point() or weight.element_size() < 2:
                continue
            if weight.ndim > 1:
                seed = zlib.crc32(f"{path}.{name}".encode())
                generator = torch.Generator(weight.device).manual_seed(seed)
                deviation = 1.0 if kind == "VocabParallelEmbedding" else weight.shape[-1] ** -0.5
                weight.data.normal_(0, deviation, generator=generator)
            elif name.endswith("bias"):
                weight.data.zero_()
            elif "Norm" in kind:
                weight.data.fill_(0 if kind == "GemmaRMSNorm" else 1)  # which adds 1
