"""Pages that a request takes, and tokens that fit, counted as vLLM counts them when it starts.

vLLM draws all pages of a model from one pool. It cuts the layers into groups of one size, whose pages have the same
bytes, and a request takes pages of each group. The tokens that fit are those of requests of the longest length.
"""

from __future__ import annotations

from dataclasses import dataclass

from lexico_kernels.memory.layout import CodeLayout

from vllm_lexico.check.model import ELEMENT_BYTES, ModelShape, OtherLayers
from vllm_lexico.config import LexicoConfig
from vllm_lexico.serve.coding_plan import MAX_WAITING_TOKENS
from vllm_lexico.serve.refusals import SUPPORTED_BLOCK_SIZES

SPARSITIES = (31, 23, 15, 11, 7)
DEFAULT_BLOCK_TOKENS = 128
SETTINGS = LexicoConfig()
PLAIN_BLOCK_TOKENS = 16  # of a page without LEXICO, and the smallest that FlashAttention reads
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

    page_bytes: of one layer, the same for all.
    token_bytes: of a token in the layers that grow with the context.
    parts: pages by kind of layer.
    """

    page_bytes: int
    token_bytes: int
    parts: tuple[Pages, ...]

    @property
    def _group_layers(self) -> int:
        """Layers of a group, as vLLM chooses it: the fewest of a kind, or the most where that is hardly more."""
        counts = [part.layers for part in self.parts]
        return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)

    @property
    def request_bytes(self) -> int:
        """Bytes that a request of the longest length takes."""
        return self._request_blocks * self._group_layers * self.page_bytes

    @property
    def _request_blocks(self) -> int:
        return sum(-(-part.layers // self._group_layers) * part.pages for part in self.parts)

    def tokens(self, cache_bytes: int, max_model_len: int) -> int:
        """Tokens that fit into a cache of so many bytes on each GPU, in requests of the longest length."""
        num_blocks = max(cache_bytes, 0) // (self._group_layers * self.page_bytes)
        return num_blocks * max_model_len // self._request_blocks


def sensible_sparsities(head_size: int) -> tuple[int, ...]:
    """Those of SPARSITIES whose codes are neither as large as fp8 nor smaller than anything that was measured."""
    layouts = [(s, CodeLayout(head_size, 1, s, s).ratio) for s in SPARSITIES]
    return tuple(s for s, ratio in layouts if SMALLEST_SHARE <= ratio < LARGEST_SHARE)


def coded_plan(shape: ModelShape, sparsity: int, load: Load) -> Plan:
    """The pages with LEXICO: codes and tail of the coded layers, what the others keep in pages of the same bytes."""
    layout = code_layout(shape, sparsity, load.gpus)
    codes = Pages(len(shape.coded), -(-load.max_model_len // layout.block_tokens))
    tail = Pages(len(shape.coded), tail_pages(layout, load))
    return Plan(
        layout.page_bytes,
        layout.cell_bytes * layout.num_kv_heads * len(shape.coded),
        (codes, tail, *_pages_of_others(shape, layout.page_bytes, load)),
    )


def plain_plan(shape: ModelShape, load: Load) -> Plan:
    """The pages of the same model without LEXICO."""
    raw = _raw_token_bytes(shape.heads.on_each(load.gpus), shape.heads.size)
    others = [_raw_token_bytes(one.heads.on_each(load.gpus), one.heads.size) for one in shape.others if one.heads]
    page_bytes = PLAIN_BLOCK_TOKENS * max([raw, *others])
    if any(one.keeps_state for one in shape.others) and (state := shape.state_bytes(load.gpus)):
        # A page holds a state, so blocks of attention are as large as that.
        page_bytes = max(page_bytes, -(-state // (PLAIN_BLOCK_TOKENS * raw)) * PLAIN_BLOCK_TOKENS * raw)
    block_tokens = page_bytes // (PLAIN_BLOCK_TOKENS * raw) * PLAIN_BLOCK_TOKENS
    if (window := shape.binding_window(load.max_model_len)) is not None:
        own = Pages(len(shape.coded), window_pages(window, False, block_tokens, load))
    else:
        own = Pages(len(shape.coded), -(-load.max_model_len // block_tokens))
    return Plan(page_bytes, raw * len(shape.coded), (own, *_pages_of_others(shape, page_bytes, load)))


def code_layout(shape: ModelShape, sparsity: int, gpus: int) -> CodeLayout:
    """The layout of a coded layer; where other layers keep tokens, its pages have room for as many as backends read."""
    sizes = [DEFAULT_BLOCK_TOKENS]
    if len(shape.coded) < shape.num_layers:
        sizes = sorted(SUPPORTED_BLOCK_SIZES, key=lambda size: (size < DEFAULT_BLOCK_TOKENS, size))
    layouts = [
        CodeLayout(shape.heads.size, shape.heads.on_each(gpus), sparsity, sparsity, "packed16", size, ELEMENT_BYTES)
        for size in sizes
    ]
    return next((one for one in layouts if one.tail_tokens >= PLAIN_BLOCK_TOKENS), layouts[0])


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
    return [found for one in shape.others if (found := _pages_of(one, shape, page_bytes, load)) is not None]


def _pages_of(one: OtherLayers, shape: ModelShape, page_bytes: int, load: Load) -> Pages | None:
    if one.window is not None and one.heads is not None:
        room = page_bytes // _raw_token_bytes(one.heads.on_each(load.gpus), one.heads.size)
        page_tokens = 1 << (room.bit_length() - 1) if room else 1
        return Pages(len(one.layers), window_pages(one.window, one.chunked, page_tokens, load))
    if one.keeps_state and (state := shape.state_bytes(load.gpus)):
        return Pages(len(one.layers), STATES_PER_REQUEST * -(-state // page_bytes))
    return None


def fixed_bytes(plan: Plan) -> int:
    """Bytes that a request of the longest length takes beside the codes, or tokens, of the layers that grow."""
    growing = plan.parts[0]
    return plan.request_bytes - growing.layers * growing.pages * plan.page_bytes


def _raw_token_bytes(heads: int, head_size: int) -> int:
    return 2 * head_size * ELEMENT_BYTES * heads
