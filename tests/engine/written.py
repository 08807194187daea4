"""What LEXICO's layers are given to store in an engine of this process, and how it is compared with training's."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy

Written = dict[int, tuple[numpy.ndarray, numpy.ndarray]]


@contextmanager
def written() -> Iterator[Written]:
    """K and V [tokens, Hk, D] by the model's layer, in float32, of the steps that run meanwhile."""
    import torch

    from vllm_lexico.serve.impl import LexicoImpl

    steps: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    found: Written = {}
    original = LexicoImpl.forward

    def forward(self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, step: Any, **more: Any) -> Any:
        if step is not None:
            rows = [given[: step.num_tokens].float() for given in (key, value)]
            steps.setdefault(self.layer_index, []).append((rows[0], rows[1]))
        return original(self, layer, query, key, value, cache, step, **more)

    LexicoImpl.forward = forward
    try:
        yield found
    finally:
        LexicoImpl.forward = original
        for layer, given in steps.items():
            keys, values = (torch.cat(vectors).numpy() for vectors in zip(*given, strict=True))
            found[layer] = keys, values


def away_from_training(model: str, dtype: str, max_model_len: int, prompt: list[int], found: Written) -> list[float]:
    """Distances between vectors that training captures and those that were written, by the mean norm, ascending.

    Args:
        model: folder.
        dtype: in which both compute.
        max_model_len: of the engine.
        prompt: what was read.
        found: of `written`, of the prompt's tokens alone.
    """
    import torch

    from vllm_lexico.train.capture import SKIPPED_TOKENS, capture, load_model
    from vllm_lexico.train.model import read_facts

    fingerprint = read_facts(model, max_model_len=max_model_len).fingerprint
    shape = fingerprint.num_kv_heads, fingerprint.head_dim
    assert set(found) == set(fingerprint.layers)
    text, kept = torch.tensor([prompt]), len(prompt) - SKIPPED_TOKENS
    loaded = load_model(model, "cpu", dtype, max_model_len=max_model_len)
    captured = capture(loaded, text, kept, fingerprint.layers, shape, seed=0, batch=1).float()
    distances = []
    for row, layer in enumerate(fingerprint.layers):
        for kv in range(2):
            ours, theirs = captured[row, kv], torch.from_numpy(found[layer][kv])[SKIPPED_TOKENS:].view(kept, *shape)
            # Training draws an order of positions; the nearest of one is the same token's of the other.
            apart = torch.cdist(ours.flatten(1), theirs.flatten(1), compute_mode="donot_use_mm_for_euclid_dist")
            nearest = torch.cat((apart.amin(0), apart.amin(1))) / theirs.flatten(1).norm(dim=1).mean()
            distances += nearest.tolist()
    return sorted(distances)
