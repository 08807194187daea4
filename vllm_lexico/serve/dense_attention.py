"""Dense attention over packed sequences, with the log-sum-exp that merging needs."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

SCORES = 1 << 24  # of the plain version at a time, float32


class Packed(NamedTuple):
    """Sequences one after another: where each starts and the last ends, int32 [B + 1], and the longest's length."""

    starts: Tensor
    longest: int


class Paged(NamedTuple):
    """Sequences of keys that share pages.

    Attributes:
        table: int32 [B, pages of the longest], the pages of each sequence.
        lengths: int32 [B], tokens of each sequence, at least 1.
        longest: tokens of the longest sequence.
        page_tokens: tokens per page.
    """

    table: Tensor
    lengths: Tensor
    longest: int
    page_tokens: int


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Packed,
    keys: Packed,
    *,
    scale: float,
    causal: bool,
    soft_cap: float = 0.0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed sequences, bottom-right causal or full.

    Args:
        query: [Tq, Hq, D].
        key, value: [Tk, Hk, D], Hq a multiple of Hk.
        queries, keys: where each sequence's are; tensors on the query's device. No sequence is empty.
        scale: factor of the scores.
        causal: the last query sees all keys, the one before all but one, and so on.
        soft_cap: scores become soft_cap * tanh(score / soft_cap), as in Gemma 2; 0 for none.
        out: [Tq, Hq, D] in the query's dtype, filled if given.

    Returns:
        [Tq, Hq, D] in the query's dtype and float32 [Hq, Tq] natural log-sum-exp.
    """
    attend = _flash_attention if takes_flash(query) else _plain_attention
    return attend(query, key, value, queries, keys, scale, causal, soft_cap, out)


def paged_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Packed, keys: Paged, *, scale: float, soft_cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Full attention of packed sequences of queries to keys that they share.

    Args:
        query: [Tq, Hq, D].
        key, value: [Tk, Hk, D], whole pages one after another, all of finite numbers.
        queries: where each sequence's are.
        keys: of the same sequences.
        scale: factor of the scores.
        soft_cap: as of `dense_attention`.

    Returns:
        As `dense_attention`.
    """
    key, value = (part.unflatten(0, (-1, keys.page_tokens)) for part in (key, value))
    if takes_flash(query):
        return _flash_attention(query, key, value, queries, keys, scale, causal=False, soft_cap=soft_cap, out=None)
    return _plain_paged(query, key, value, queries, keys, scale, soft_cap)


def merge_into(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Join attention over two disjoint sets of keys by their log-sum-exps, in one pass over memory.

    Args:
        out: [T, Hq, D], contiguous in its last two dimensions; overwritten by the same over both sets.
        lse: float32 [Hq, T], any strides; overwritten.
        other_out, other_lse: of the other set.
    """
    joint = torch.empty_like(other_lse)
    merge_attn_states(out, out, lse.contiguous(), other_out, other_lse, joint)
    lse.copy_(joint)


def takes_flash(query: Tensor) -> bool:
    """Whether queries are FlashAttention's to attend with: on a GPU in half precision, which is all that it knows."""
    return query.is_cuda and query.dtype != torch.float32


def scratch_bytes(query: Tensor) -> int:
    """What attention takes beside its results: of the plain version, scores, their weights and what is masked."""
    return 0 if takes_flash(query) else 3 * 4 * SCORES


@functools.cache
def _flash_version(head_size: int) -> int:
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=head_size)
    assert version is not None, "vLLM has no FlashAttention for this GPU"
    return version


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Packed,
    keys: Packed | Paged,
    scale: float,
    causal: bool,
    soft_cap: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    if isinstance(keys, Paged):
        where = {"seqused_k": keys.lengths, "block_table": keys.table}
    else:
        where = {"cu_seqlens_k": keys.starts}
    out, lse, *_ = flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=queries.longest,
        cu_seqlens_q=queries.starts,
        max_seqlen_k=keys.longest,
        softmax_scale=scale,
        causal=causal,
        softcap=soft_cap,
        return_softmax_lse=True,
        out=out,
        fa_version=_flash_version(query.shape[-1]),
        **where,
    )
    return out, lse


def _plain_paged(
    query: Tensor, key: Tensor, value: Tensor, queries: Packed, keys: Paged, scale: float, soft_cap: float
) -> tuple[Tensor, Tensor]:
    out, lse = torch.empty_like(query), query.new_empty(query.shape[1::-1], dtype=torch.float32)
    starts = queries.starts.tolist()
    for sequence, length in enumerate(keys.lengths.tolist()):
        pages = keys.table[sequence].long()
        seen_key, seen_value = (part[pages].flatten(0, 1)[:length] for part in (key, value))
        for rows in _few_rows(starts[sequence], starts[sequence + 1], query.shape[1] * length):
            out[rows], lse[:, rows] = _attend(query[rows], seen_key, seen_value, None, scale, soft_cap)
    return out, lse


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Packed,
    keys: Packed,
    scale: float,
    causal: bool,
    soft_cap: float,
    out: Tensor | None,
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query) if out is None else out
    lse = query.new_empty(query.shape[1::-1], dtype=torch.float32)
    query_starts, key_starts = queries.starts.tolist(), keys.starts.tolist()
    for sequence, first in enumerate(query_starts[:-1]):
        end = query_starts[sequence + 1]
        seen = slice(key_starts[sequence], key_starts[sequence + 1])
        ahead = seen.stop - seen.start - (end - first)
        for rows in _few_rows(first, end, query.shape[1] * (seen.stop - seen.start)):
            last_seen = None
            if causal:
                last_seen = torch.arange(rows.start - first, rows.stop - first, device=query.device)[:, None] + ahead
            out[rows], lse[:, rows] = _attend(query[rows], key[seen], value[seen], last_seen, scale, soft_cap)
    return out, lse


def _few_rows(first: int, end: int, scores_per_row: int) -> Iterator[slice]:
    """Rows [first, end) in pieces of about SCORES scores."""
    count = max(SCORES // max(scores_per_row, 1), 1)
    for row in range(first, end, count):
        yield slice(row, min(row + count, end))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, last_seen: Tensor | None, scale: float, soft_cap: float
) -> tuple[Tensor, Tensor]:
    num_queries, num_heads, head_dim = query.shape
    num_keys, num_kv_heads, _ = key.shape
    grouped = query.view(num_queries, num_kv_heads, -1, head_dim).float() * scale
    scores = torch.einsum("qhgd,khd->hgqk", grouped, key.float())
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    if last_seen is not None:
        scores.masked_fill_(torch.arange(num_keys, device=scores.device) > last_seen, float("-inf"))
    lse = scores.logsumexp(-1)
    out = torch.einsum("hgqk,khd->qhgd", (scores - lse[..., None]).exp(), value.float())
    return out.reshape(num_queries, num_heads, head_dim).to(query.dtype), lse.flatten(0, 1)
