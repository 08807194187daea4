"""Which tokens a step codes and which it reads raw: device arithmetic over the runner's tables, no host reads.

B requests, T tokens of the batch (both may be padded), P tokens a code page, R tokens a tail page.
"""

from __future__ import annotations

import torch
from lexico_kernels.memory.layout import SPAN_TOKENS
from torch import Tensor

# A step leaves at most this many tokens to be coded that it could have coded: a group that waits, and one not complete.
MAX_WAITING_TOKENS = 2 * SPAN_TOKENS - 1
SKIPPED = -1


def max_coded_tokens(num_tokens: int, num_requests: int) -> int:
    """Most tokens that a step of `num_tokens` tokens of `num_requests` requests can code; fixes launch sizes."""
    return min(num_tokens, num_tokens // SPAN_TOKENS + 2 * num_requests) * SPAN_TOKENS


def locate_tokens(query_start_loc: Tensor, seq_lens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Find the request and the position of every token of the batch.

    Args:
        query_start_loc: int32 [B + 1], first token of each request in the batch.
        seq_lens: int32 [B], tokens of each request once the step is done.
        num_tokens: T; tokens at and after `query_start_loc[B]` are padding.

    Returns:
        int64 [T] request of each token and int64 [T] position in its sequence, -1 for padding.
    """
    num_requests = seq_lens.shape[0]
    token = torch.arange(num_tokens, device=seq_lens.device, dtype=query_start_loc.dtype)
    request = torch.searchsorted(query_start_loc[1 : num_requests + 1], token, right=True)
    is_padding = request >= num_requests
    request = request.clamp(max=num_requests - 1)
    position = seq_lens[request].long() - (query_start_loc[1:][request] - token)
    return request, torch.where(is_padding, SKIPPED, position)


def coded_tokens(
    request: Tensor, position: Tensor, block_table: Tensor, block_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """List the tokens of every group that this step codes.

    A block's last group is coded by the step that writes its last token, since others may read the block then. Another
    group waits for as many tokens more as the block's page says (`_waits`), so that requests that complete groups in
    the same step are coded in different ones. What a step writes decides, so that rewritten tokens are coded again.

    Args:
        request, position: int64 [T] from `locate_tokens`.
        block_table: int32 [B, max_pages], of the code pages.
        block_tokens: P.

    Returns:
        Of M = max_coded_tokens(T, B) tokens, those to be coded first: int64 [M] row in the batch, counted as if the
        whole group were in it; int64 [M] request; int64 [M] position, -1 where the list is not used.
    """
    num_tokens, num_requests = position.shape[0], block_table.shape[0]
    max_groups = max_coded_tokens(num_tokens, num_requests) // SPAN_TOKENS
    block, offset = position.clamp(min=0) // block_tokens, position % block_tokens
    waits = torch.where(offset == block_tokens - 1, 0, _waits(block_table[request, block]))
    ends_group = (offset >= waits) & ((offset - waits + 1) % SPAN_TOKENS == 0) & (position >= 0)
    target = torch.where(ends_group, ends_group.cumsum(0) - 1, max_groups)  # the last entry collects what is no end
    ends = position.new_full((max_groups + 1,), SKIPPED)
    rows = torch.arange(num_tokens, device=position.device)
    ends = ends.scatter_(0, target, rows)[:max_groups]
    last = ends.clamp(min=0)
    back = torch.arange(1 - SPAN_TOKENS, 1, device=position.device) - waits[last][:, None]
    member_position = torch.where((ends >= 0)[:, None], position[last][:, None] + back, SKIPPED)
    member_row = ends[:, None] + back
    member_request = request[last][:, None].expand_as(member_row)
    return member_row.flatten(), member_request.flatten(), member_position.flatten()


def _waits(page: Tensor) -> Tensor:
    """Tokens that groups of a page wait for, 0 to G - 1: a hash, since pages of requests that started together lie at
    equal distances. int64."""
    mixed = page.long() * 1640531527 % (1 << 31)
    mixed = (mixed ^ mixed >> 15) * 1812433253 % (1 << 31)
    return mixed * SPAN_TOKENS >> 31


def sources(
    members: tuple[Tensor, Tensor, Tensor],
    query_start_loc: Tensor,
    tail_block_table: Tensor,
    tail_tokens: int,
    *,
    from_batch: bool,
) -> Tensor:
    """Say where each token to code is read: row of the batch, or -1 - slot in the tail pages. int32 [M].

    from_batch: read there those that are in it; a long chunk has no tail pages for some.
    """
    row, request, position = members
    slot = _slots(request, position, tail_block_table, tail_tokens)
    if not from_batch:
        return (-1 - slot).to(torch.int32)
    return torch.where(row >= query_start_loc[request], row, -1 - slot).to(torch.int32)


def destinations(members: tuple[Tensor, Tensor, Tensor], block_table: Tensor, block_tokens: int) -> Tensor:
    """Say where each code goes: page * P + offset, or -1 for nowhere. int64 [M]."""
    _, request, position = members
    return torch.where(position >= 0, _slots(request, position, block_table, block_tokens), SKIPPED)


def raw_starts(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    tail_block_table: Tensor,
    *,
    window_tokens: int,
    tail_tokens: int,
    sink_end: int,
) -> Tensor:
    """Find the first position after the sinks that is read from tail pages rather than codes. int32 [B].

    Tail pages cover the `window_tokens` before the step's first position. After a prefix-cache hit the first of them
    may be null; those that are there are an unbroken run up to the step's first position.
    """
    num_requests, width = seq_lens.shape[0], tail_block_table.shape[1]
    query_lens = query_start_loc[1 : num_requests + 1] - query_start_loc[:num_requests]
    computed = (seq_lens - query_lens).long().clamp(min=0)
    first_page = (computed - window_tokens).clamp(min=0) // tail_tokens
    ahead = torch.arange(-(-window_tokens // tail_tokens) + 1, device=seq_lens.device)
    pages = first_page[:, None] + ahead
    block = tail_block_table[:num_requests].gather(1, pages.clamp(max=width - 1))
    is_missing = (block == 0) & (pages * tail_tokens < computed[:, None])
    first_raw_page = first_page + ((ahead + 1) * is_missing).amax(1)
    return (first_raw_page * tail_tokens).clamp(min=sink_end).to(torch.int32)


def _slots(request: Tensor, position: Tensor, block_table: Tensor, page_tokens: int) -> Tensor:
    position = position.clamp(min=0)
    page = block_table[request, position // page_tokens].long()
    return page * page_tokens + position % page_tokens
