"""What the requests in prefill attend to: their own chunks, and their history in tiles of bounded size.

History is rebuilt from codes into a workspace that does not grow with the context. What is rebuilt together is planned
once a step and is the same in every layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_lexico.serve.dense_attention import Packed

# K and V of history that are rebuilt at a time: 16,384 tokens of 8 heads of 128 in half precision. Every tile but the
# last costs a pass over the queries' results to merge, 2 % of what attending it costs at this size.
HISTORY_BYTES = 64 << 20


@dataclass(frozen=True)
class HistoryTile:
    """History that is attended together: stretches of adjacent requests, one after another.

    rows: tokens of these requests among those in prefill.
    queries, keys: where each request's are among these rows, and in the tile.
    token_request, token_position: int32 [n], what the tile's tokens are.
    """

    rows: slice
    queries: Packed
    keys: Packed
    token_request: torch.Tensor
    token_position: torch.Tensor


@dataclass(frozen=True)
class PrefillPlan:
    """A step's requests in prefill: where their chunks are, and the tiles of what came before them."""

    num_tokens: int
    chunks: Packed
    tiles: list[HistoryTile]


def history_tokens(num_kv_heads: int, head_size: int, dtype: torch.dtype) -> int:
    """Tokens of a full tile."""
    return max(HISTORY_BYTES // (2 * num_kv_heads * head_size * dtype.itemsize), 1)


def plan_prefill(
    query_lens: Sequence[int], seq_lens: Sequence[int], first_request: int, tile_tokens: int, device: torch.device
) -> PrefillPlan:
    """Plan a step.

    Args:
        query_lens: of the requests in prefill, new tokens; 0 at the end for padding.
        seq_lens: of the same, tokens once the step is done.
        first_request: row of the first of them in the block tables.
        tile_tokens: most history tokens of a tile.
        device: where the plan's tensors go.
    """
    starts = starts_of(query_lens)
    count = sum(query_len > 0 for query_len in query_lens)
    history = [seq_lens[i] - query_lens[i] for i in range(count)]
    tiles = []
    for spans in _cut(history, tile_tokens):
        first, last = spans[0][0], spans[-1][0]
        request = [first_request + i for i, _, _ in spans]
        lengths = [stop - start for _, start, stop in spans]
        tiles.append(
            HistoryTile(
                slice(starts[first], starts[last + 1]),
                packed(query_lens[first : last + 1], device),
                packed(lengths, device),
                *tokens_of(request, [start for _, start, _ in spans], lengths, device),
            )
        )
    return PrefillPlan(starts[count], packed(query_lens[:count], device), tiles)


def _cut(history: Iterable[int], tile_tokens: int) -> list[list[tuple[int, int, int]]]:
    """Fill tiles with (request, start, stop). A request without history ends a tile: none is attended with no keys."""
    tiles: list[list[tuple[int, int, int]]] = []
    room = 0
    for request, length in enumerate(history):
        if not length:
            room = 0
        start = 0
        while start < length:
            if not room:
                tiles.append([])
                room = tile_tokens
            stop = min(length, start + room)
            tiles[-1].append((request, start, stop))
            room -= stop - start
            start = stop
    return tiles


def tokens_of(
    requests: list[int], starts: list[int], lengths: list[int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and position of every token of stretches that lie one after another."""
    total = sum(lengths)
    # A stretch's position is the token's place in the tile plus this.
    shift = [start - before for start, before in zip(starts, starts_of(lengths), strict=False)]
    table = async_tensor_h2d([requests, shift, lengths], device, torch.int32)
    request, shift_of_token = table[:2].repeat_interleave(table[2], dim=1, output_size=total)
    return request, shift_of_token + torch.arange(total, device=device, dtype=torch.int32)


def starts_of(lengths: Sequence[int]) -> list[int]:
    """Where stretches that lie one after another start, and where the last ends."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return starts


def packed(lengths: Sequence[int], device: torch.device) -> Packed:
    """Sequences of these lengths, one after another."""
    return Packed(async_tensor_h2d(starts_of(lengths), device, torch.int32), max(lengths, default=0))
