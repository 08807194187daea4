"""What the requests in prefill attend to where answers are the same cold and after a prefix-cache hit.

With the setting `"prefix_hits": "same"` the block of P tokens that a query lies in decides what it reads raw: its
block and the window before it. All else but the sinks it reads from codes, its own chunk's too, so that neither chunks
nor hits, which end at whole blocks, change what is read. Chunks are cut into pieces at the ends of blocks. Each piece
attends to its raw keys, of which the tiles hold copies, and all pieces share the codes that are rebuilt for them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_lexico.serve.coding_plan import Reach
from vllm_lexico.serve.dense_attention import Packed, Paged
from vllm_lexico.serve.prefill_plan import packed, starts_of, tokens_of

ALL_CODED = torch.iinfo(torch.int32).max  # a raw_start that no position reaches


class Piece(NamedTuple):
    """A chunk's tokens in one block.

    Attributes:
        request: among those in prefill.
        row: of its first token among the tokens in prefill.
        start, stop: its positions.
        raw_start: its keys from here on are raw.
        computed: tokens before its chunk.
    """

    request: int
    row: int
    start: int
    stop: int
    raw_start: int
    computed: int

    @property
    def raw_tokens(self) -> int:
        """Keys that it reads raw."""
        return self.stop - self.raw_start

    @property
    def tail_tokens(self) -> int:
        """Of these, keys that its chunk does not have."""
        return max(self.computed - self.raw_start, 0)


@dataclass(frozen=True)
class RawTile:
    """Adjacent pieces, each with a copy of its raw keys; causal.

    Attributes:
        rows: the pieces' tokens among those in prefill.
        queries, keys: where each piece's are among these rows, and in the tile.
        key_row: int32 [n], row of each key among the tokens in prefill; 0 for keys from before the chunk.
        place: int64 [h], where in the tile keys from before the chunk go.
        token_request, token_position: int32 [h], what these are.
    """

    rows: slice
    queries: Packed
    keys: Packed
    key_row: Tensor
    place: Tensor
    token_request: Tensor
    token_position: Tensor


@dataclass(frozen=True)
class CodedTile:
    """Whole blocks of sinks and codes, and the pieces that see some of them.

    Attributes:
        rows: the pieces' tokens among those in prefill.
        queries, keys: where each piece's are among these rows, and in the tile.
        token_request, token_position: int32 [n], what the tile's tokens are.
    """

    rows: slice
    queries: Packed
    keys: Paged
    token_request: Tensor
    token_position: Tensor


@dataclass(frozen=True)
class BlockPlan:
    """A step's requests in prefill: tiles of raw keys, which cover all of its tokens, and of codes.

    Attributes:
        num_tokens: in prefill.
        raw, coded: the tiles.
        all_coded: int32 [B], a raw_start for all requests of the step with which everything but sinks is codes.
    """

    num_tokens: int
    raw: list[RawTile]
    coded: list[CodedTile]
    all_coded: Tensor


def plan_blocks(
    query_lens: Sequence[int],
    seq_lens: Sequence[int],
    first_request: int,
    reach: Reach,
    tile_tokens: int,
    device: torch.device,
) -> BlockPlan:
    """Plan a step.

    Args:
        query_lens: of the requests in prefill, new tokens; 0 at the end for padding.
        seq_lens: of the same, tokens once the step is done.
        first_request: row of the first of them in the block tables.
        reach: how far back queries read raw.
        tile_tokens: most tokens of a tile, but see `Reach.most_tokens`.
        device: where the plan's tensors go.
    """
    pieces = list(_cut(query_lens, seq_lens, reach))
    raw = [_raw_tile(group, first_request, device) for group in _raw_groups(pieces, tile_tokens)]
    coded = [
        _coded_tile(group, first_request, reach.block_tokens, device)
        for group in _coded_groups(pieces, reach.block_tokens, max(tile_tokens // reach.block_tokens, 1))
    ]
    num_requests = first_request + len(query_lens)
    all_coded = torch.full((num_requests,), ALL_CODED, dtype=torch.int32, device=device)
    return BlockPlan(sum(query_lens), raw, coded, all_coded)


def _cut(query_lens: Sequence[int], seq_lens: Sequence[int], reach: Reach) -> Iterator[Piece]:
    """Cut chunks at the ends of blocks."""
    row = 0
    for request, (query_len, seq_len) in enumerate(zip(query_lens, seq_lens, strict=True)):
        computed = start = seq_len - query_len
        while query_len and start < seq_len:
            stop = min((start // reach.block_tokens + 1) * reach.block_tokens, seq_len)
            yield Piece(request, row, start, stop, reach.raw_start(start), computed)
            row += stop - start
            start = stop


def _raw_groups(pieces: Sequence[Piece], tile_tokens: int) -> list[list[Piece]]:
    groups: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not groups or piece.raw_tokens > room:
            groups.append([])
            room = tile_tokens
        groups[-1].append(piece)
        room -= piece.raw_tokens
    return groups


def _raw_tile(pieces: Sequence[Piece], first_request: int, device: torch.device) -> RawTile:
    lengths, before = [piece.raw_tokens for piece in pieces], [piece.tail_tokens for piece in pieces]
    raw_starts = [piece.raw_start for piece in pieces]
    # A key's row is its position plus this.
    shifts = [piece.row - piece.start for piece in pieces]
    shift, position = tokens_of(shifts, raw_starts, lengths, device)
    _, place = tokens_of([0] * len(pieces), starts_of(lengths)[:-1], before, device)
    requests = [first_request + piece.request for piece in pieces]
    return RawTile(
        _rows(pieces),
        _queries(pieces, device),
        packed(lengths, device),
        # Rows of other requests stand for keys from before the chunk until these are put over them.
        (shift + position).clamp_(min=0),
        place.long(),
        *tokens_of(requests, raw_starts, before, device),
    )


class _Stretch(NamedTuple):
    """Blocks of one request from `start` up to `stop`, and the pieces that see any of them."""

    start: int
    stop: int
    pieces: list[Piece]


def _coded_groups(pieces: Sequence[Piece], block_tokens: int, tile_blocks: int) -> list[list[_Stretch]]:
    """Fill tiles with stretches of adjacent requests. The rows of a tile lie together, so it ends before a piece that
    sees no codes."""
    groups: list[list[_Stretch]] = []
    room = 0
    for _, of_request in itertools.groupby(pieces, key=lambda piece: piece.request):
        own = list(of_request)
        if not own[0].raw_start:
            room = 0
        start, blocks = 0, -(-own[-1].raw_start // block_tokens)
        while start < blocks:
            if not room:
                groups.append([])
                room = tile_blocks
            stop = min(blocks, start + room)
            seeing = [piece for piece in own if piece.raw_start > start * block_tokens]
            groups[-1].append(_Stretch(start, stop, seeing))
            room -= stop - start
            start = stop
    return groups


def _coded_tile(
    stretches: Sequence[_Stretch], first_request: int, block_tokens: int, device: torch.device
) -> CodedTile:
    pieces = [piece for stretch in stretches for piece in stretch.pieces]
    blocks = [stretch.stop - stretch.start for stretch in stretches]
    first_pages, lengths = [], []
    for stretch, first_page in zip(stretches, starts_of(blocks), strict=False):
        for piece in stretch.pieces:
            first_pages.append(first_page)
            lengths.append(min(piece.raw_start, stretch.stop * block_tokens) - stretch.start * block_tokens)
    table = async_tensor_h2d([first_pages, lengths], device, torch.int32)
    pages = torch.arange(max(blocks), device=device, dtype=torch.int32)
    requests = [first_request + stretch.pieces[0].request for stretch in stretches]
    starts = [stretch.start * block_tokens for stretch in stretches]
    return CodedTile(
        _rows(pieces),
        _queries(pieces, device),
        Paged((table[0, :, None] + pages).clamp_(max=sum(blocks) - 1), table[1], max(lengths), block_tokens),
        *tokens_of(requests, starts, [count * block_tokens for count in blocks], device),
    )


def _rows(pieces: Sequence[Piece]) -> slice:
    last = pieces[-1]
    return slice(pieces[0].row, last.row + last.stop - last.start)


def _queries(pieces: Sequence[Piece], device: torch.device) -> Packed:
    return packed([piece.stop - piece.start for piece in pieces], device)
