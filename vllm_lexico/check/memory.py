"""Pages that a request takes, and tokens that fit, counted as vLLM counts them when it starts.

vLLM draws all pages of a model from one pool of blocks. It cuts the layers into groups, and a request takes blocks for
each group. The tokens that fit are those of requests of the longest length.
"""

from __future__ import annotations

from dataclasses import dataclass

from lexico_kernels.memory.layout import CodeLayout

from vllm_lexico.check.model import ELEMENT_BYTES, Heads, ModelShape, OtherLayers
from vllm_lexico.config import LexicoConfig
from vllm_lexico.serve import state_blocks
from vllm_lexico.serve.coding_plan import MAX_WAITING_TOKENS
from vllm_lexico.serve.refusals import DEFAULT_BLOCK_SIZE, FITTING_BLOCK_SIZES, STATE_BLOCK_SIZES
from vllm_lexico.serve.state_blocks import States

SPARSITIES = (31, 23, 15, 11, 7)
SETTINGS = LexicoConfig()
PLAIN_BLOCK_TOKENS = state_blocks.SMALLEST_PAGE  # of a page without LEXICO
# A code of half the bytes is what fp8 takes; below a sixteenth nothing was measured.
LARGEST_SHARE, SMALLEST_SHARE = 1 / 2, 1 / 16
CONCURRENT_BATCHES = 2  # asynchronous scheduling, which vLLM switches on by itself
STATES_PER_REQUEST = 2  # a running one and the one of the last page, which prefix caching keeps


@dataclass(frozen=True)
class Load:
    """What an engine is asked to hold. chunk_tokens: most tokens of a step; gpus: that share the heads."""

    max_model_len: int
    chunk_tokens: int
    gpus: int = 1
    concurrent_batches: int = CONCURRENT_BATCHES

    @property
    def in_flight_tokens(self) -> int:
        """Most tokens that are scheduled and not yet settled."""
        return self.concurrent_batches * self.chunk_tokens


@dataclass(frozen=True)
class Pages:
    """Layers with equal pages. pages: that a request of the longest length takes in each."""

    layers: int
    pages: int


@dataclass(frozen=True)
class Plan:
    """How a cache is laid out on each GPU.

    block_bytes: of a block of the pool.
    token_bytes: of a token in the layers that grow with the context.
    growing_blocks: that a request of the longest length takes for those.
    other_blocks: that it takes beside them.
    """

    block_bytes: int
    token_bytes: int
    growing_blocks: int
    other_blocks: int

    @property
    def request_bytes(self) -> int:
        """Bytes that a request of the longest length takes."""
        return (self.growing_blocks + self.other_blocks) * self.block_bytes

    @property
    def other_bytes(self) -> int:
        """Those of them that the layers which grow with the context do not take for its tokens."""
        return self.other_blocks * self.block_bytes

    def tokens(self, cache_bytes: int, max_model_len: int) -> int:
        """Tokens that fit into a cache of so many bytes on each GPU, in requests of the longest length."""
        num_blocks = max(cache_bytes, 0) // self.block_bytes
        return int(num_blocks / (self.growing_blocks + self.other_blocks) * max_model_len)  # rounded as vLLM does


def _in_groups(page_bytes: int, token_bytes: int, growing: Pages, others: list[Pages]) -> Plan:
    """Layers in groups of one size, with pages of the same bytes in all of them.

    vLLM takes the fewest layers of a kind for that size, or the most where they are hardly more.
    """
    counts = [growing.layers, *(part.layers for part in others)]
    layers = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    blocks = [-(-part.layers // layers) * part.pages for part in (growing, *others)]
    return Plan(layers * page_bytes, token_bytes, blocks[0], sum(blocks[1:]))


def sensible_sparsities(head_size: int) -> tuple[int, ...]:
    """Those of SPARSITIES whose codes are neither as large as fp8 nor smaller than anything that was measured."""
    layouts = [(s, CodeLayout(head_size, 1, s, s).ratio) for s in SPARSITIES]
    return tuple(s for s, ratio in layouts if SMALLEST_SHARE <= ratio < LARGEST_SHARE)


def coded_plan(shape: ModelShape, sparsity: int, load: Load) -> Plan:
    """The pages with LEXICO: codes and tail of the coded layers, and what the others keep."""
    state = shape.state_bytes(load.gpus) if shape.keeps_states else None
    if state is not None:
        return _beside_states(shape, sparsity, load, state)
    layout = code_layout(shape, sparsity, load.gpus)
    coded = len(shape.coded)
    codes, tail = Pages(coded, -(-load.max_model_len // layout.block_tokens)), Pages(coded, tail_pages(layout, load))
    token_bytes = layout.cell_bytes * layout.num_kv_heads * coded
    return _in_groups(layout.page_bytes, token_bytes, codes, [tail, *_pages_of_others(shape, layout.page_bytes, load)])


def _beside_states(shape: ModelShape, sparsity: int, load: Load, state_bytes: int) -> Plan:
    """A block has the code pages of all coded layers, or as many states as fit: see `serve/other_layers.py`."""
    coded = len(shape.coded)
    kept = States(len(shape.state_layers), state_bytes, STATES_PER_REQUEST)
    layouts = {size: _layout(shape, sparsity, load.gpus, size) for size in STATE_BLOCK_SIZES}
    counted = {
        size: state_blocks.count_blocks(layout, coded, kept, load.max_model_len, tail_pages(layout, load))
        for size, layout in layouts.items()
    }
    plain_tokens = state_blocks.plain_block_tokens(state_bytes, _raw_token_bytes(shape.heads, load))
    tokens = state_blocks.block_tokens(counted, plain_tokens, load.chunk_tokens)
    layout, blocks = layouts[tokens], counted[tokens]
    token_bytes = layout.cell_bytes * layout.num_kv_heads * coded
    return Plan(blocks.block_bytes, token_bytes, blocks.codes, blocks.tail + blocks.states)


def plain_plan(shape: ModelShape, load: Load) -> Plan:
    """The pages of the same model without LEXICO."""
    raw = _raw_token_bytes(shape.heads, load)
    page_bytes = PLAIN_BLOCK_TOKENS * max(
        [raw, *(_raw_token_bytes(one.heads, load) for one in shape.others if one.heads)]
    )
    if shape.keeps_states and (state := shape.state_bytes(load.gpus)):
        # A page holds a state, so blocks of attention are as large as that.
        page_bytes = max(page_bytes, state_blocks.plain_block_tokens(state, raw) * raw)
    block_tokens = page_bytes // (PLAIN_BLOCK_TOKENS * raw) * PLAIN_BLOCK_TOKENS
    window = shape.binding_window(load.max_model_len)
    pages = -(-load.max_model_len // block_tokens)
    own = Pages(len(shape.coded), pages if window is None else window_pages(window, False, block_tokens, load))
    return _in_groups(page_bytes, raw * len(shape.coded), own, _pages_of_others(shape, page_bytes, load))


def code_layout(shape: ModelShape, sparsity: int, gpus: int) -> CodeLayout:
    """The layout of a coded layer; where other layers keep tokens, its pages have room for as many as backends read."""
    sizes = [DEFAULT_BLOCK_SIZE]
    if len(shape.coded) < shape.num_layers:
        sizes = list(FITTING_BLOCK_SIZES)
    layouts = [_layout(shape, sparsity, gpus, size) for size in sizes]
    return next((one for one in layouts if one.tail_tokens >= PLAIN_BLOCK_TOKENS), layouts[0])


def _layout(shape: ModelShape, sparsity: int, gpus: int, block_tokens: int) -> CodeLayout:
    heads = shape.heads.on_each(gpus)
    return CodeLayout(shape.heads.size, heads, sparsity, sparsity, "packed16", block_tokens, ELEMENT_BYTES)


def tail_pages(layout: CodeLayout, load: Load, settings: LexicoConfig = SETTINGS) -> int:
    """Pages of full-precision tokens that a request holds at most: `LexicoTailSpec.max_admission_blocks_per_request`.

    Args:
        layout: of a coded layer.
        load: of the engine.
        settings: of LEXICO, without drafts.
    """
    page_tokens = layout.tail_tokens
    retained = max(settings.window, MAX_WAITING_TOKENS)
    retained += layout.block_tokens if settings.prefix_hits != "codes" else 0
    windows = (load.concurrent_batches + 1) * (-(-retained // page_tokens) + 1)
    in_flight = -(-(retained + load.in_flight_tokens) // page_tokens) + 1
    sinks = -(-settings.sinks // page_tokens)
    return min(sinks + min(windows, in_flight), -(-load.max_model_len // page_tokens))


def window_pages(window: int, chunked: bool, page_tokens: int, load: Load) -> int:
    """Pages of raw tokens that a request holds at most in a layer with a window, or with attention in chunks."""
    kept = min(window - (not chunked) + load.in_flight_tokens, load.max_model_len)
    return -(-kept // page_tokens) + (not chunked)


def _pages_of_others(shape: ModelShape, page_bytes: int, load: Load) -> list[Pages]:
    """What the other layers keep in pages of so many bytes, by kind; all states are one kind."""
    found = [_window_pages_of(one, page_bytes, load) for one in shape.others if one.window and one.heads]
    if shape.keeps_states and (state := shape.state_bytes(load.gpus)):
        found.append(Pages(len(shape.state_layers), STATES_PER_REQUEST * -(-state // page_bytes)))
    return found


def _window_pages_of(one: OtherLayers, page_bytes: int, load: Load) -> Pages:
    assert one.window is not None and one.heads is not None
    room = page_bytes // _raw_token_bytes(one.heads, load)
    page_tokens = 1 << (room.bit_length() - 1) if room else 1
    return Pages(len(one.layers), window_pages(one.window, one.chunked, page_tokens, load))


def _raw_token_bytes(heads: Heads, load: Load) -> int:
    """Bytes of a token's keys and values in a layer on each GPU, in 16 bits."""
    return 2 * heads.size * ELEMENT_BYTES * heads.on_each(load.gpus)
