"""Blocks of a pool that hold the code pages of all coded layers, or the states of some others. No vLLM here.

Serving chooses the tokens of a block by this count, and `vllm-lexico check` says with it how many fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lexico_kernels.memory.layout import CodeLayout

NEARLY = 1.1  # of two that cost the same within a tenth the smaller is taken
DEARER = 1.25  # what blocks may cost that are no larger than vLLM's own, so that prefix-cache hits are no shorter
SMALLEST_PAGE = 16  # tokens, of vLLM's own backends on GPUs


class States(NamedTuple):
    """What a request keeps besides codes and tail on a rank.

    layers: that keep a state.
    num_bytes: of one.
    per_layer: the running one, that of the last whole block where it is kept, and one per drafted token.
    """

    layers: int
    num_bytes: int
    per_layer: int


class StateBlocks(NamedTuple):
    """Blocks that a request of the longest length takes for codes, for its tail and for states; bytes of each."""

    block_bytes: int
    codes: int
    tail: int
    states: int

    @property
    def request_bytes(self) -> int:
        """Bytes of them all."""
        return self.block_bytes * (self.codes + self.tail + self.states)


def count_blocks(
    layout: CodeLayout, coded_layers: int, states: States, max_model_len: int, tail_pages: int
) -> StateBlocks:
    """Count what a request of the longest length takes where blocks of codes have `layout.block_tokens`.

    Args:
        layout: of a coded layer.
        coded_layers: of a rank.
        states: of the same rank.
        max_model_len: tokens of the longest request.
        tail_pages: that a coded layer holds at most of it.
    """
    block_bytes = max(layout.page_bytes * coded_layers, states.num_bytes)
    codes = -(-max_model_len // layout.block_tokens)
    of_states = states.per_layer * -(-states.layers // (block_bytes // states.num_bytes))
    return StateBlocks(block_bytes, codes, tail_pages, of_states)


def plain_block_tokens(state_bytes: int, raw_token_bytes: int) -> int:
    """Tokens of a block of attention beside states without LEXICO: vLLM makes a page as large as a state.

    Args:
        state_bytes: of a layer.
        raw_token_bytes: of a token's keys and values in a layer.
    """
    return SMALLEST_PAGE * -(-state_bytes // (SMALLEST_PAGE * raw_token_bytes))


def leaves_room(block_tokens: int, step_tokens: int) -> bool:
    """Whether prompts go on while others decode, where states are kept at the ends of blocks for prefix-cache hits.

    vLLM then has a step of prefill end with a block, if a step may have as many tokens as a block. What decodes takes
    some of a step's tokens; where a block wants all of them, no prompt goes on before the last request that decodes has
    ended.

    Args:
        block_tokens: of a block.
        step_tokens: of a step at most, `max_num_scheduled_tokens` or else `max_num_batched_tokens`.
    """
    return block_tokens > step_tokens or 2 * block_tokens <= step_tokens


def block_tokens(counted: Mapping[int, StateBlocks], plain_tokens: int, step_tokens: int = 0) -> int:
    """Tokens of a block with which a request takes hardly more than with any that leaves room: the fewest of these.

    Small blocks leave a part of each block of codes empty, large ones a part of each block of states; prefix-cache
    hits end at whole blocks. So blocks larger than vLLM's own are taken only where smaller ones would cost too much.

    Args:
        counted: by a block's tokens.
        plain_tokens: of vLLM's own, from `plain_block_tokens`.
        step_tokens: see `leaves_room`; 0 where no states are kept for hits, so that all blocks do.
    """
    counted = {tokens: blocks for tokens, blocks in counted.items() if leaves_room(tokens, step_tokens)}
    least = min(blocks.request_bytes for blocks in counted.values())
    best = min(tokens for tokens, blocks in counted.items() if blocks.request_bytes <= NEARLY * least)
    as_small = [
        tokens
        for tokens, blocks in counted.items()
        if tokens <= plain_tokens and blocks.request_bytes <= DEARER * least
    ]
    return max(as_small) if as_small and best > plain_tokens else best
