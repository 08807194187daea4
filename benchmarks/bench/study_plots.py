"""The picture of `quality_study.py`: a panel a study, in the looks of the frontier."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.study_points import TAIL_STUDIES
from bench.tail_cost import BLOCKS, REQUEST_TOKENS
from vllm_lexico.dictionary.picture import LOOKS
from vllm_lexico.evals.results.frontier import SPARE, mark, scale_bytes

DOTS_PER_INCH = 90
COLOURS = 32  # of a picture's palette: lines, text and their edges; keeps the file small
PANELS = {
    "sparsity": ("Sparsity: what a byte buys", "bytes a token, % of bf16"),
    "window": ("Window, from 0 to 256 tokens", f"held by a request of {REQUEST_TOKENS:,} tokens, % of bf16"),
    "gain": ("Gain: codes made longer", ""),
    "layers": ("Some layers finer, others coarser, equal bytes", ""),
    "key_value": ("Keys against values, equal bytes", "keys' share of the atoms, %"),
    "error": ("Stopping at a relative error", "bytes a token if a code took only what it uses, % of bf16"),
    "sinks": ("Sinks: first tokens kept", f"held by a request of {REQUEST_TOKENS:,} tokens, % of bf16"),
    "dictionary": ("Dictionaries", ""),
}
NAMED = ("gain", "layers", "dictionary")  # their x axis has names
TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LINES = (("#D55E00", "o"), ("#0072B2", "s"), *SPARE)
BLOCK_LINES = {64: ":", 128: "-"}

Case = Mapping[str, Any]


def draw(cases: Sequence[Case], path: Path, separate: bool = False) -> None:
    """Write a .png of all studies that cases of rows have; with `separate` one of each beside it, path's stem first.

    ValueError where matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
    except ImportError as error:
        raise ValueError(f"drawing needs matplotlib ({error}); run `pip install matplotlib`") from error
    studies = [name for name in PANELS if any(case["study"] == name for case in cases)]
    with rc_context(LOOKS):
        _save(studies, cases, path)
        for name in studies if separate else ():
            _save([name], cases, path.with_stem(f"{path.stem}_{name}"))


def _save(studies: list[str], cases: Sequence[Case], path: Path) -> None:
    """A picture of these studies, of few colours."""
    from matplotlib.figure import Figure
    from PIL import Image

    columns = min(len(studies), 3)
    lines = -(-len(studies) // columns)
    figure = Figure(figsize=(4.9 * columns, 3.7 * lines + 0.5), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for place, name in zip(axes, studies, strict=False):
        _draw(place, name, cases)
    for place in axes[len(studies) :]:
        place.set_axis_off()
    figure.suptitle(f"{cases[0]['model']}, {cases[0]['windows']} windows of WikiText-2; bars: 95 %", fontsize=11)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=DOTS_PER_INCH, format="png")
    Image.open(picture).convert("RGB").quantize(COLOURS).save(path, optimize=True)


def _draw(axes: Any, study: str, cases: Sequence[Case]) -> None:
    title, label = PANELS[study]
    own = [case for case in cases if case["study"] == study]
    looks = iter(LINES)
    for series in dict.fromkeys(case["series"] for case in own):
        of_series, look = [case for case in own if case["series"] == series], next(looks)
        if study in TAIL_STUDIES:
            for block in BLOCKS:
                _line(axes, of_series, lambda case, b=block: case["held_percent"][str(b)], look, BLOCK_LINES[block],
                      f"{series}, blocks of {block}", block == BLOCKS[-1])  # fmt: skip
        elif study in NAMED:
            _line(axes, of_series, lambda case: case["x"], look, "", series, False)
        else:
            along = {"sparsity": "bytes_percent", "error": "used_percent"}.get(study, "x")
            _line(axes, of_series, lambda case, k=along: case[k], look, "-", series, True)
    if study == "error":
        fixed = [case for case in cases if case["study"] == "sparsity"]
        _line(axes, fixed, lambda case: case["bytes_percent"], ("0.55", "."), "--", "fixed S", False)
    if study in NAMED:
        names = {case["x"]: case["name"] for case in own}
        axes.set_xticks(list(names), list(names.values()), rotation=20, ha="right", fontsize=8)
    elif study in ("sparsity", "error"):
        scale_bytes(axes, [x for line in axes.get_lines() for x in line.get_xdata()])
    axes.set(title=title, xlabel=label)
    _scale_loss(axes)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=8)


def _line(axes: Any, cases: list[Case], along: Any, look: tuple[str, str], line: str, label: str, named: bool) -> None:
    """One series: percent of perplexity above bf16's, with its interval."""
    points = []
    for case in cases:
        loss, half = 100 * (case["ratio"] - 1), 100 * (case["ratio_95_percent"] or 0)
        points.append({"x": along(case), "y": loss, "bars": [loss - half, loss + half]})
        if named:
            at = (points[-1]["x"], loss)
            axes.annotate(case["name"], at, (3, 5), textcoords="offset points", fontsize=7.5, color=look[0])
    if points:
        mark(axes, points, line, *look, label)


def _scale_loss(axes: Any) -> None:
    """Linear to 1 %, logarithmic above: one loss may be a hundred times another."""
    axes.set_yscale("symlog", linthresh=1)
    axes.margins(x=0.1, y=0.1)
    low, high = axes.get_ylim()
    ticks = [tick for tick in TICKS if tick <= high * 1.05]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.set_ylim(max(low, -1), high)
    axes.set_ylabel("perplexity above bf16's, %")
