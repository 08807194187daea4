"""Dense attention over one request's or a batch's tokens, with the log-sum-exp that merging needs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

QUERY_ROWS = 256  # rows of the plain version's score matrix at a time


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, *, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences, bottom-right causal or full.

    Args:
        query: [Tq, Hq, D].
        key, value: [Tk, Hk, D], Hq a multiple of Hk.
        query_starts, key_starts: int32 [B + 1] on the CPU, where each sequence starts.
        scale: factor of the scores.
        causal: the last query sees all keys, the one before all but one, and so on.

    Returns:
        [Tq, Hq, D] in the query's dtype and float32 [Tq, Hq] natural log-sum-exp.
    """
    attend = _flash_attention if query.is_cuda else _plain_attention
    return attend(query, key, value, query_starts, key_starts, scale, causal)


def merge(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Join attention over two disjoint sets of keys by their log-sum-exps.

    Args:
        out, other_out: [T, Hq, D].
        lse, other_lse: float32 [T, Hq].

    Returns:
        The same over both sets, the output in float32.
    """
    joint = torch.logaddexp(lse, other_lse)
    out = out.float() * (lse - joint).exp()[..., None]
    return out.addcmul_(other_out.float(), (other_lse - joint).exp()[..., None]), joint


@functools.cache
def _flash_version(head_size: int) -> int:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=head_size)
    assert version is not None, "vLLM has no FlashAttention for this GPU"
    return version


def _flash_attention(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    out, lse, *_ = flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=int(query_starts.diff().max()),
        cu_seqlens_q=query_starts.to(query.device, torch.int32, non_blocking=True),
        max_seqlen_k=int(key_starts.diff().max()),
        cu_seqlens_k=key_starts.to(query.device, torch.int32, non_blocking=True),
        softmax_scale=scale,
        causal=causal,
        return_softmax_lse=True,
        fa_version=_flash_version(query.shape[-1]),
    )
    return out, lse.T


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, query_starts: Tensor, key_starts: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query)
    lse = query.new_empty(query.shape[:2], dtype=torch.float32)
    for sequence in range(len(query_starts) - 1):
        first, end = int(query_starts[sequence]), int(query_starts[sequence + 1])
        keys = slice(int(key_starts[sequence]), int(key_starts[sequence + 1]))
        ahead = keys.stop - keys.start - (end - first)
        for row in range(first, end, QUERY_ROWS):
            rows = slice(row, min(row + QUERY_ROWS, end))
            last_seen = torch.arange(rows.start - first, rows.stop - first)[:, None] + ahead if causal else None
            out[rows], lse[rows] = _attend(query[rows], key[keys], value[keys], last_seen, scale)
    return out, lse


def _attend(query: Tensor, key: Tensor, value: Tensor, last_seen: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, _ = key.shape
    grouped = query.view(num_queries, num_kv_heads, -1, head_dim).float() * scale
    scores = torch.einsum("qhgd,khd->hgqk", grouped, key.float())
    if last_seen is not None:
        scores.masked_fill_(torch.arange(num_keys) > last_seen, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("hgqk,khd->qhgd", (scores - lse[..., None]).exp(), value.float())
    return out.reshape(num_queries, num_heads, head_dim).to(query.dtype), lse.flatten(0, 1).T
