"""The picture of the frontier: what the model can still do against the bytes per token."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_lexico.dictionary.picture import DOTS_PER_INCH, LOOKS

# Panels by the metric that they show: title, label of the axis, whether less is better, what is drawn of a row.
PANELS: dict[str, tuple[str, str, bool, tuple[str, str, str]]] = {
    "qa": ("Questions about one of many passages", "share found", False, ("value", "low", "high")),
    "pairs": ("Values of random keys", "share found", False, ("value", "low", "high")),
    "code": ("Programs after long code", "share solved", False, ("value", "low", "high")),
    "gsm8k": ("GSM8K, strict match", "share solved", False, ("value", "low", "high")),
    "wikitext": ("WikiText-2", "perplexity, times bf16's", True, ("ratio", "ratio_low", "ratio_high")),
    "needle": ("Needles in long texts", "share found", False, ("value", "low", "high")),
    "agreement": ("Agreement with bf16's answers", "share until they part", False, ("value", "low", "high")),
}
# Of Okabe and Ito, told apart by the colour-blind too; families that are not listed take the rest in turn.
LOOKS_OF = {"lexico": ("#D55E00", "o"), "fp8": ("#0072B2", "s"), "turboquant": ("#009E73", "^"), "bf16": ("0.25", "D")}
SPARE = (("#CC79A7", "v"), ("#E69F00", "P"), ("#56B4E9", "X"))
TICKS = (2, 3, 4, 6, 8, 12, 16, 25, 35, 50, 70, 100)


def plot_frontier(metrics: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each task that has results and write a .png. ValueError where matplotlib is missing."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(f"drawing needs matplotlib ({error}); run `pip install matplotlib`") from error
    panels = {metric: points(metrics, metric) for metric in PANELS}
    panels = {metric: found for metric, found in panels.items() if found}
    if not panels:
        raise ValueError("there is no result to draw yet")
    with rc_context(LOOKS):
        columns = min(len(panels), 2)
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(6.2 * columns, 4.7 * lines + 0.8), layout="constrained")
        axes = list(figure.subplots(lines, columns, squeeze=False).flat)
        for place, (metric, found) in zip(axes, panels.items(), strict=False):
            _draw(place, metric, found)
        for place in axes[len(panels) :]:
            place.set_axis_off()
        model = Path(metrics["config"]["model"]).name
        figure.suptitle(
            f"{model}: quality against bytes per token\nmarks: a long sequence; thin lines reach to what the measured "
            f"sequences held, tail included; bars: 95 %",
            fontsize=11,
        )
        figure.savefig(path, dpi=DOTS_PER_INCH)


def points(metrics: Mapping[str, Any], metric: str) -> dict[str, list[dict[str, Any]]]:
    """What a panel shows, by family: x, held, y and its interval; rows without a figure are left out."""
    value, low, high = PANELS[metric][3]
    families: dict[str, list[dict[str, Any]]] = {}
    for name, cache in metrics["caches"].items():
        for task in cache["tasks"].values():
            for row in task["measures"]:
                if row["metric"] == metric and row[value] is not None and cache["bytes_percent"]:
                    bars = [row[value] if row[bound] is None else row[bound] for bound in (low, high)]
                    point = {"name": name, "x": cache["bytes_percent"], "held": row["held_percent"]}
                    families.setdefault(cache["family"], []).append(point | {"y": row[value], "bars": bars})
    return families


def _draw(axes: Any, metric: str, families: Mapping[str, list[dict[str, Any]]]) -> None:
    title, label, less_is_better, _ = PANELS[metric]
    spare = iter(SPARE * len(families))
    xs = []
    for family, found in families.items():
        colour, marker = LOOKS_OF.get(family) or next(spare)
        # A line joins a family's caches by their bytes; those with options are variants of one and stand alone.
        mark(axes, [point for point in found if "+" not in point["name"]], "-", colour, marker)
        mark(axes, [point for point in found if "+" in point["name"]], "", colour, marker)
        for point in found:
            if point["held"]:
                axes.plot([point["x"], point["held"]], [point["y"]] * 2, color=colour, linewidth=0.7, alpha=0.6)
            words = point["name"].removeprefix("turboquant_")
            axes.annotate(words, (point["x"], point["y"]), (4, 6), textcoords="offset points", fontsize=8, color=colour)
        if family == "bf16":
            axes.axhline(found[0]["y"], color=colour, linewidth=0.9, linestyle=":")
        xs += [x for point in found for x in (point["x"], point["held"]) if x]
    scale_bytes(axes, xs)
    axes.set(title=title, xlabel="bytes per token, % of 16 bits (logarithmic)")
    axes.set_ylabel(label + (" (axis turned: up is better)" if less_is_better else ""))
    axes.margins(x=0.12, y=0.15)
    if less_is_better:
        axes.invert_yaxis()


def scale_bytes(axes: Any, xs: list[float]) -> None:
    """A logarithmic axis of percentages with ticks that are easy to read. xs: what it shows."""
    axes.set_xscale("log")
    ticks: list[float] = [tick for tick in TICKS if 0.8 * min(xs) <= tick <= 1.25 * max(xs)] or [round(xs[0], 2)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xticks([], minor=True)


def mark(axes: Any, found: list[dict[str, Any]], line: str, colour: str, marker: str, label: str | None = None) -> None:
    """Points (x, y, bars) with their intervals, joined by a line in the order of x."""
    found = sorted(found, key=lambda point: point["x"])
    x, y = [point["x"] for point in found], [point["y"] for point in found]
    below = [max(point["y"] - point["bars"][0], 0) for point in found]
    above = [max(point["bars"][1] - point["y"], 0) for point in found]
    style = {"linestyle": line, "linewidth": 1.4, "elinewidth": 1.2, "capsize": 3}
    axes.errorbar(x, y, [below, above], color=colour, marker=marker, label=label, **style)
