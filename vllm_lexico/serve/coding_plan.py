"""Which tokens a step codes and which it reads raw: device arithmetic over the runner's tables, no host reads.

B requests, T tokens of the batch (both may be padded), P tokens a code page, R tokens a tail page.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from lexico_kernels.memory.layout import DELAY_BITS, DELAY_FACTORS, DELAY_SHIFT, SPAN_TOKENS
from torch import Tensor

# Most tokens that a step may leave uncoded: a span that is delayed, and one that is not complete.
MAX_WAITING_TOKENS = 2 * SPAN_TOKENS - 1
SKIPPED = -1


class Reach(NamedTuple):
    """What decides how far back queries read raw; its methods hold where answers are the same cold and after a hit.

    Attributes:
        block_tokens: P there (`block_plan.py`), else 1: the window is counted from its last multiple.
        tail_tokens: R.
        window_tokens: tokens before a block that are raw, rounded up to whole pages.
        sink_end: end of the sinks, a multiple of R.
    """

    block_tokens: int
    tail_tokens: int
    window_tokens: int
    sink_end: int

    def raw_start(self, position: int) -> int:
        """From where on a query's keys are raw; 0 where no codes lie between them and the sinks."""
        block = position // self.block_tokens * self.block_tokens
        start = max(block - self.window_tokens, 0) // self.tail_tokens * self.tail_tokens
        return start if start > self.sink_end else 0

    def most_tokens(self, tile_tokens: int) -> int:
        """Most tokens of a tile: of either kind it has at least one piece or page."""
        return max(tile_tokens, self.sink_end + self.window_tokens + self.tail_tokens + self.block_tokens)


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


class CodingPlan(NamedTuple):
    """The tokens that a step codes: M = max_coded_tokens(T, B) of them at most, those to be coded first.

    Attributes:
        row: int64 [M], row in the batch, counted as if the token's whole span were in it; None where the plan was
            made by `decode_plan`, since a step in which all requests decode reads no row of its batch.
        request: int64 or int32 [M].
        position: int64 or int32 [M], in the request's sequence; -1 where the list is not used.
    """

    row: Tensor | None
    request: Tensor
    position: Tensor

    def sources(
        self, query_start_loc: Tensor, tail_block_table: Tensor, tail_tokens: int, *, from_batch: bool
    ) -> Tensor:
        """Say where each token is read: row of the batch, or -1 - slot in the tail pages; -1 for none. int32 [M].

        Args:
            query_start_loc: int32 [B + 1].
            tail_block_table: int32 [B, max_pages], of the tail pages.
            tail_tokens: R.
            from_batch: read there the tokens that are in it; a long chunk has no tail pages for some.
        """
        slot = _slots(self.request, self.position, tail_block_table, tail_tokens)
        place = torch.where(self.position >= 0, -1 - slot, SKIPPED)
        if from_batch:
            assert self.row is not None, "planned for a step in which all requests decode"
            place = torch.where(self.row >= query_start_loc[self.request], self.row, place)
        return place.to(torch.int32)

    def destinations(self, block_table: Tensor, block_tokens: int) -> Tensor:
        """Say where each code goes: page * P + offset, or -1 for nowhere. int64 [M].

        Args:
            block_table: int32 [B, max_pages], of the code pages.
            block_tokens: P.
        """
        slot = _slots(self.request, self.position, block_table, block_tokens)
        return torch.where(self.position >= 0, slot, SKIPPED)


class PlanHandover:
    """Hands a step's coding plan from the builder of a group of codes to that of the group of the same layers' tails.

    The plan depends on the pages of codes, and the tail's builder needs it too. vLLM builds its groups in the order of
    their layers, so groups of codes, whose layers the model has, come first. There are several of each kind where
    other layers are fewer than those that are coded, and vLLM cuts both kinds alike.
    """

    def __init__(self) -> None:
        self._plans: dict[str, CodingPlan] = {}

    def put(self, layer_names: Sequence[str], plan: CodingPlan) -> None:
        """Leave the plan of the step that is being built, for these layers."""
        self._plans.update(dict.fromkeys(layer_names, plan))

    def take(self, layer_names: Sequence[str]) -> CodingPlan:
        """The plan of the step that is being built, for these layers; it can be taken once."""
        plans = [self._plans.pop(name, None) for name in layer_names]
        assert plans[0] is not None, "a step's codes were not planned before its tail"
        return plans[0]


def plan_coding(request: Tensor, position: Tensor, block_table: Tensor, block_tokens: int) -> CodingPlan:
    """Plan which tokens this step codes: those of every span whose turn it is.

    A block's last span is coded by the step that writes its last token, since others may read the block then. Another
    span is delayed by as many tokens as the block's page says (`_delay`), so that requests that complete spans in the
    same step are coded in different ones. What a step writes decides, so that rewritten tokens are coded again.

    Args:
        request, position: int64 [T] from `locate_tokens`.
        block_table: int32 [B, max_pages], of the code pages.
        block_tokens: P.
    """
    num_tokens, num_requests = position.shape[0], block_table.shape[0]
    max_spans = max_coded_tokens(num_tokens, num_requests) // SPAN_TOKENS
    block, offset = position.clamp(min=0) // block_tokens, position % block_tokens
    delay = torch.where(offset == block_tokens - 1, 0, _delay(block_table[request, block]))
    ends_span = (offset >= delay) & ((offset - delay + 1) % SPAN_TOKENS == 0) & (position >= 0)
    target = torch.where(ends_span, ends_span.cumsum(0) - 1, max_spans)  # the last place collects what is no end
    ends = position.new_full((max_spans + 1,), SKIPPED)
    rows = torch.arange(num_tokens, device=position.device)
    ends = ends.scatter_(0, target, rows)[:max_spans]
    last = ends.clamp(min=0)
    back = torch.arange(1 - SPAN_TOKENS, 1, device=position.device) - delay[last][:, None]
    span_position = torch.where((ends >= 0)[:, None], position[last][:, None] + back, SKIPPED)
    span_row = ends[:, None] + back
    span_request = request[last][:, None].expand_as(span_row)
    return CodingPlan(span_row.flatten(), span_request.flatten(), span_position.flatten())


def _delay(page: Tensor) -> Tensor:
    """Tokens by which spans of a page are delayed, 0 to 31; int64.

    A hash, since pages of requests that started together lie at equal distances.
    """
    first, second = DELAY_FACTORS
    mixed = page.long() * first % (1 << DELAY_BITS)
    mixed = (mixed ^ mixed >> DELAY_SHIFT) * second % (1 << DELAY_BITS)
    return mixed * SPAN_TOKENS >> DELAY_BITS


def raw_starts(
    query_start_loc: Tensor,
    seq_lens: Tensor,
    tail_block_table: Tensor,
    *,
    window_tokens: int,
    tail_tokens: int,
    sink_end: int,
    block_tokens: int = 1,
) -> Tensor:
    """Find the first position after the sinks that is read from tail pages rather than codes. int32 [B].

    Tail pages cover the `window_tokens` before the step's first position. After a prefix-cache hit the first of them
    may be null; those that are there are an unbroken run up to the step's first position.

    Args:
        query_start_loc: int32 [B + 1].
        seq_lens: int32 [B], tokens of each request once the step is done.
        tail_block_table: int32 [B, max_pages], of the tail pages.
        window_tokens: tokens before the step that are read raw.
        tail_tokens: R.
        sink_end: end of the sinks, a multiple of R.
        block_tokens: the window is counted from the last multiple of this up to the step's first position.
    """
    num_requests, width = seq_lens.shape[0], tail_block_table.shape[1]
    query_lens = query_start_loc[1 : num_requests + 1] - query_start_loc[:num_requests]
    computed = (seq_lens - query_lens).long().clamp(min=0) // block_tokens * block_tokens
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
