"""Diagrams of what the code does, drawn from the objects that define it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lexico_kernels import KV, CodeLayout
from lexico_kernels.memory.layout import ENTRY_BYTES, SCALE_BYTES, SPAN_TOKENS

KEY, VALUE, SCALE, PAD = "#0072B2", "#D55E00", "#F0E442", "0.88"
RAW, CODES, WAITING, NEW = "#009E73", "#56B4E9", "#E69F00", "0.25"
LAYOUT = CodeLayout(128, 8, 15, 15)
WINDOW, SINKS, LENGTH = 128, 16, 512


def _box(
    axes: Any,
    x: float,
    y: float,
    width: float,
    height: float,
    colour: str,
    words: str = "",
    edge: float = 1.0,
    **text: Any,
) -> None:
    """A filled rectangle with words in its middle."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor="white", linewidth=edge))
    style = {"ha": "center", "va": "center", "fontsize": 8.5} | text
    axes.text(x + width / 2, y + height / 2, words, **style)


def _bare(axes: Any, right: float, top: float, title: str) -> None:
    axes.set(xlim=(0, right), ylim=(0, top))
    axes.set_title(title, loc="left")
    axes.set_axis_off()


def draw_pages(figure: Any, _: Path) -> None:
    """The bytes of a code page and of a tail page, and of the records of a span in it, to scale within each line."""
    layout = LAYOUT
    pages, record, span = figure.subplots(3, 1, height_ratios=(6, 3, 3))
    heads, width = layout.num_kv_heads, layout.page_bytes
    for head in range(heads):
        for kv, colour in zip(KV, (KEY, VALUE), strict=True):
            at = head * layout.head_bytes + layout.kv_offset_bytes(kv)
            size = layout.block_tokens * layout.vector_bytes(kv)
            words = f"{kv[0].upper()} {layout.block_tokens}" if head < 2 else ""
            _box(pages, at, 2.2, size, 0.8, colour, words, color="white")
        _box(pages, head * layout.head_bytes, 3.05, layout.head_bytes, 0.35, "0.95", f"head {head}")
        token = layout.raw_token_bytes * layout.tail_tokens
        _box(pages, head * token, 0.4, token, 0.8, RAW, f"{layout.tail_tokens} raw", color="white")
    if padding := width - layout.tail_page_bytes:
        _box(pages, layout.tail_page_bytes, 0.4, padding, 0.8, PAD, "padding")
    kib = layout.page_bytes / 1024
    pages.text(0, 3.6, f"code page: {kib:g} KiB, {layout.block_tokens} tokens of {heads} KV heads", fontsize=9.5)
    words = f"tail page: {kib:g} KiB, {layout.tail_tokens} tokens in full precision, [Hk, R, 2, D]"
    pages.text(0, 1.35, words, fontsize=9.5)
    _bare(pages, width, 4.0, f"Pages of one layer: D = {layout.head_dim}, sparsity {layout.key_sparsity}, packed16")
    _draw_record(record)
    _draw_span(span)


def _draw_record(axes: Any) -> None:
    """A key's record, in the order in which it is listed."""
    layout = LAYOUT
    _box(axes, 0, 0.5, SCALE_BYTES, 0.8, SCALE, "scale\nbf16")
    for index in range(layout.key_sparsity):
        at = SCALE_BYTES + index * ENTRY_BYTES
        _box(axes, at, 0.5, ENTRY_BYTES, 0.8, KEY, "atom 12\nlevel 4", color="white", fontsize=7)
    bf16, total = layout.head_dim * 2, layout.vector_bytes("key")
    _bare(axes, total, 1.6, f"One key of one head: {total} bytes instead of {bf16} in bf16 ({total / bf16:.1%})")


def _draw_span(axes: Any) -> None:
    """The same bytes of a span's keys, as they lie in the page."""
    (field,) = LAYOUT.fields("key").values()
    size, width = field.width_bytes, field.span_tokens * field.width_bytes
    for piece in range(field.pieces):
        start, scale = piece * width, 0 if piece else SCALE_BYTES
        for token in range(field.span_tokens):
            _box(axes, start + token * size, 0.5, scale, 0.8, SCALE, edge=0)
            _box(axes, start + token * size + scale, 0.5, size - scale, 0.8, KEY, edge=0)
        axes.plot([start + width] * 2, [0.5, 1.3], color="white", linewidth=2.0)
        words = f"bytes {piece * size} to {(piece + 1) * size - 1} of each"
        axes.text(start + width / 2, 0.2, words, ha="center", va="center", fontsize=8)
    total = SPAN_TOKENS * LAYOUT.vector_bytes("key")
    _bare(
        axes, total, 1.6, f"Keys of a span of {SPAN_TOKENS} tokens as they lie in the page: {total} bytes, word by word"
    )


def draw_journey(figure: Any, _: Path) -> None:
    """Where the tokens of a request stand while it decodes."""
    axes = figure.subplots()
    layout, now = LAYOUT, LENGTH
    sinks = -(-SINKS // layout.tail_tokens) * layout.tail_tokens
    window = (now - WINDOW) // layout.tail_tokens * layout.tail_tokens
    waiting = now - now % SPAN_TOKENS - SPAN_TOKENS
    _box(axes, 0, 1.6, sinks, 0.7, RAW)
    axes.text(sinks / 2, 2.45, "sinks", ha="center", fontsize=9)
    _box(axes, sinks, 1.6, window - sinks, 0.7, CODES, "read from codes")
    _box(axes, window, 1.6, now - window, 0.7, RAW, f"window: newest {WINDOW}, read raw", color="white")
    _box(axes, now, 1.6, 6, 0.7, NEW)
    axes.text(now + 3, 2.45, "new", ha="center", fontsize=9)
    _box(axes, 0, 0.6, waiting, 0.7, CODES, "coded, in code pages of 128 tokens")
    _box(axes, waiting, 0.6, now - waiting, 0.7, WAITING, "waiting")
    for at in range(0, waiting + 1, SPAN_TOKENS):
        axes.plot([at, at], [0.6, 1.3], color="white", linewidth=0.6)
    axes.text(-6, 1.95, "reads", ha="right", va="center")
    axes.text(-6, 0.95, "holds", ha="right", va="center")
    words = (
        f"A token is raw when it is new. It is coded with its span of {SPAN_TOKENS}, after a delay of 0 to "
        f"{SPAN_TOKENS - 1} tokens, so at most {2 * SPAN_TOKENS - 1} wait.\nIts raw page is given back when it leaves "
        f"the window; the first {sinks} tokens keep theirs for the request's life."
    )
    axes.text(0, 0.0, words, fontsize=9)
    _bare(axes, now + 12, 2.9, f"A request of {LENGTH} tokens that decodes (window {WINDOW}, {sinks} sinks)")
    axes.set_xlim(-42, now + 12)
    axes.set_ylim(-0.1, 2.9)


STEP: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "once per step",
        (
            ("codes group's builder", "CodingPlan: which tokens,\nwhere to"),
            ("tail group's builder", "where from,\nraw ranges"),
        ),
    ),
    (
        "in each layer",
        (("write_tail", "raw tokens\ninto tail pages"), ("omp_encode", "codes into code pages\n(steps with prefill)")),
    ),
    (
        "in the last layer",
        (("omp_encode_layers", "steps of decode: one launch codes all layers,\nas all of their tokens are stored"),),
    ),
    (
        "then decode rows",
        (
            ("prepare", "q · atoms;\nraw tail"),
            ("attend_codes", "look-ups,\nbins"),
            ("multiply_bins", "bins · atoms"),
            ("merge", "codes + tail"),
        ),
    ),
    (
        "and prefill rows",
        (("dense_attention", "the chunk, raw"), ("reconstruct", "tiles of history"), ("merge_into", "by log-sum-exp")),
    ),
)


def draw_step(figure: Any, _: Path) -> None:
    """What one step runs, in order: builders, then per layer writes before reads."""
    axes = figure.subplots()
    colours = (WAITING, RAW, CODES, KEY, VALUE)
    top = len(STEP)
    for line, ((when, boxes), colour) in enumerate(zip(STEP, colours, strict=True)):
        y = top - 1 - line
        axes.text(-0.1, y + 0.4, when, ha="right", va="center", fontsize=9.5)
        width = 8 / len(boxes)
        for place, (name, words) in enumerate(boxes):
            _box(axes, place * width, y, width - 0.08, 0.8, colour, f"{name}\n{words}", color="white", fontsize=8.5)
    _bare(axes, 8, top, "One step")
    axes.set_xlim(-1.6, 8)
