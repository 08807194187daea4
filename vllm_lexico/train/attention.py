"""The attention of models that are captured from: transformers' own where it is exact, else written out."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

ATTENTION_NAME = "lexico_capture"  # of `heard_attention`, for transformers
Attention = Callable[..., tuple[torch.Tensor, None]]

_listening = threading.local()


def heard_attention(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """See `exact_attention`: what models of `capture.load_model` call, which listens where this thread does."""
    attention: Attention = getattr(_listening, "attention", exact_attention)
    return attention(module, *args, **kwargs)


@contextmanager
def listening(attention: Attention) -> Iterator[None]:
    """Have models of `capture.load_model` call an attention function like `exact_attention`, in this thread."""
    before = getattr(_listening, "attention", exact_attention)
    _listening.attention = attention
    try:
        yield
    finally:
        _listening.attention = before


def exact_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function of transformers, also for models with learned sinks or a soft cap, which SDPA leaves out.

    Args:
        module: the attention layer.
        query: [batch, Hq, T, D].
        key: [batch, Hk, S, D]; S is T, and more where there is a cache.
        value: [batch, Hk, S, D].
        mask: bool, True where a query sees a key, or numbers that are added to scores; [batch, 1 or Hq, T, S]. None: as
            SDPA takes it, causal where there are several queries.
        kwargs: `scaling` of scores; `s_aux`, [Hq], a sink's score for every head (gpt-oss); `softcap` (Gemma 2).

    Returns:
        [batch, T, Hq, D], and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if kwargs.get("s_aux") is None and kwargs.get("softcap") is None:
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    scale = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    if mask is None and query.shape[2] > 1 and getattr(module, "is_causal", True):
        mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    rows = []
    for row in range(len(query)):  # one text at a time: all scores of one are large enough
        seen = None if mask is None else mask[min(row, len(mask) - 1)]
        rows.append(_attend(query[row], key[row], value[row], seen, scale, kwargs.get("softcap"), kwargs.get("s_aux")))
    return torch.stack(rows).transpose(1, 2).contiguous(), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One text: query [Hq, T, D], key and value [Hk, S, D], mask [1 or Hq, T, S], sinks [Hq] -> [Hq, T, D]."""
    group = len(query) // len(key)
    key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
    scores = (query @ key.transpose(1, 2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, scores.shape[1], 1)), -1)
    weights = scores.softmax(-1)[..., : key.shape[1]]
    return weights.to(value.dtype) @ value
