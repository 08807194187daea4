"""K (after RoPE) and V of every layer, taken from a transformers model while it reads training text."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

ATTENTION_NAME = "lexico_capture"
SKIPPED_TOKENS = 16  # the first tokens of a sequence stay exact in the cache and look like no others


@dataclass
class _Request:
    """What the attention function has to keep of the batch that is running."""

    store: torch.Tensor | None = None  # [layers, 2, tokens, Hk, D]
    rows: dict[int, int] | None = None  # layer -> row of the store
    positions: torch.Tensor | None = None  # int64 [batch, kept]
    queries: torch.Tensor | None = None  # float32 [layers, Hk, D]
    offset: int = 0


_request = _Request()


def _capturing_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """transformers' SDPA attention that first copies K and V [batch, Hk, T, D] of the wanted positions to the store."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    request = _request
    if request.store is not None and request.rows is not None and request.positions is not None:
        row = request.rows.get(module.layer_idx)
        if row is not None:
            batch, heads, _, dim = key.shape
            if value.shape != key.shape or request.store.shape[3:] != (heads, dim):
                raise ValueError(
                    f"layer {module.layer_idx} has K {tuple(key.shape)} and V {tuple(value.shape)}; allowed are "
                    f"models with the same KV heads and head size in every layer, for K and V alike; use another model"
                )
            at = request.positions[:, None, :, None].expand(batch, heads, -1, dim)
            for kv, vectors in enumerate((key, value)):
                kept = vectors.gather(2, at).transpose(1, 2).flatten(0, 1)
                request.store[row, kv, request.offset : request.offset + len(kept)] = kept
            if request.queries is not None:
                squares = query[:, :, SKIPPED_TOKENS:].float().square().sum((0, 2))
                request.queries[row] += squares.view(heads, -1, dim).sum(1)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def load_model(model: str, device: str, dtype: str) -> Any:
    """The causal language model in eval mode, with the attention function that can capture. dtype: "auto" or a name."""
    from transformers import AutoModelForCausalLM
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _capturing_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, sdpa_mask)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation=ATTENTION_NAME)
    return loaded.to(device).eval()


@torch.no_grad()
def capture(
    model: Any,
    sequences: torch.Tensor,
    kept: int,
    layers: Iterable[int],
    shape: tuple[int, int],
    seed: int,
    batch: int,
    *,
    furthest: int = 0,
    queries: torch.Tensor | None = None,
) -> torch.Tensor:
    """K and V [layers, 2, sequences * kept, Hk, D] in the model's dtype, on its device, sequence by sequence.

    sequences: int64 [count, length]. kept: positions of a sequence, random, none of the first 16. layers: which ones.
    shape: (Hk, D). batch: sequences a pass. furthest: every other sequence is read as if it stood somewhere in a
    context of so many tokens (0: all at its start), which turns keys as a long context does and costs nothing.
    queries: float32 [layers, Hk, D] to which the squares of all queries of a head's group are added, if given.
    ValueError when a layer has no ordinary K and V.
    """
    count, length = sequences.shape
    rows = {layer: row for row, layer in enumerate(layers)}
    size = (len(rows), 2, count * kept, *shape)
    store = torch.zeros(size, dtype=model.dtype, device=model.device)
    generator = torch.Generator().manual_seed(seed)
    _request.rows, _request.store, _request.queries = rows, store, queries
    try:
        for at in tqdm(range(0, count, batch), desc="reading text", unit="batch", leave=False, mininterval=1.0):
            ids = sequences[at : at + batch].to(model.device)
            first = torch.randint(max(furthest - length, 0) + 1, (len(ids), 1), generator=generator)
            first[(torch.arange(at, at + len(ids)) // 2) % 2 == 0] = 0  # pairs, as texts come from sources in turn
            addresses = first.to(model.device) + torch.arange(length, device=model.device)
            order = torch.rand(len(ids), length - SKIPPED_TOKENS, generator=generator).argsort(1)
            _request.positions = (order[:, :kept] + SKIPPED_TOKENS).to(model.device)
            _request.offset = at * kept
            model.base_model(ids, position_ids=addresses, use_cache=False)
    finally:
        _request.store = _request.rows = _request.positions = _request.queries = None
    silent = [layer for layer, row in rows.items() if not store[row, :, :, 0, 0].any()]
    if silent:
        raise ValueError(
            f"layers {silent} have no K and V of ordinary attention; allowed are models whose every layer has; "
            f"take another model"
        )
    return store
