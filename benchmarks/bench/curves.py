"""Curves from the rows of `benchmarks/results`: the newest row of each case, with the GPU that it was measured on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_lexico.evals.results.frontier import LOOKS_OF, mark, scale_bytes

Row = dict[str, Any]
GPU_LINES = {"H100": "-", "H200": "--"}
COLOURS = {12.5: "#D55E00", 6.25: "#CC79A7", "fp8": "#0072B2"}
SHORT_ANSWER = 128  # tokens, where a starved row does not say them
MODEL = "Qwen2.5-Coder-1.5B-Instruct"
PANELS = {"gsm8k": "GSM8K", "wikitext": "1 / perplexity, WikiText-2", "needle": "needles of 4k to 32k"}
DOCUMENT_PANELS = {
    "qa": "answers in passages",
    "pairs": "values of random keys",
    "code": "programs after long code",
    "needle": "needles",
    "wikitext": "1 / perplexity, WikiText-2",
}
SIZES = {"length", "kind", "passages", "pairs"}  # a row that has one of these is of a part of its task
APART = 1.045  # of marks at the same bytes


def newest(path: Path, key: Callable[[Row], Any]) -> dict[Any, Row]:
    """Rows of a file by their key, the last of each; rows whose key is None are left out."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {found: row for row in rows if (found := key(row)) is not None}


def _gpu(row: Row) -> str:
    return next((name for name in GPU_LINES if name in (row["gpu"] or "")), "")


def draw_decode(figure: Any, results: Path) -> None:
    """Attention of a decode step, times as fast as FlashAttention 3 on bf16, by the length of contexts."""
    axes = figure.subplots()

    def key(row: Row) -> Any:
        case = row["case"]
        shape = tuple(case.get(name) for name in ("head_dim", "kv_heads", "heads", "value_sparsity", "layers"))
        plain = shape[:4] == (128, 8, 32, None) and shape[4] in (None, 1)
        if row["metric"] != "speedup" or row["peer"] != "FLASH_ATTN" or not plain:
            return None
        return _gpu(row), case["bytes_percent"], case["batch"], case["context"]

    rows = newest(results / "decode.jsonl", key)
    loads = sorted({(context, batch) for _, _, batch, context in rows})
    series = [
        (gpu, percent) for percent in (12.5, 6.25) for gpu in GPU_LINES if (gpu, percent) in {k[:2] for k in rows}
    ]
    width = 0.8 / len(series)
    for at, (gpu, percent) in enumerate(series):
        found = [(x, rows.get((gpu, percent, batch, context))) for x, (context, batch) in enumerate(loads)]
        bars = [(x + (at - (len(series) - 1) / 2) * width, row["value"]) for x, row in found if row]
        look = {"color": COLOURS[percent], "alpha": 1.0 if gpu == "H100" else 0.55}
        label = f"{percent:g} % of the bytes, {gpu}"
        axes.bar_label(axes.bar(*zip(*bars, strict=True), width, label=label, **look), fmt="%.1f", fontsize=8)
    axes.axhline(1, color="0.25", linewidth=0.9, linestyle=":")
    axes.set_xticks(range(len(loads)), [f"{batch} x {context / 1024:g}k" for context, batch in loads])
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="requests x context", ylabel="times as fast as FlashAttention 3 on bf16")
    axes.set_title("Attention of a decode step, 8 KV heads of 128, 32 query heads", loc="left")
    axes.legend(loc="upper left")


def draw_answers(figure: Any, results: Path) -> None:
    """Throughput of starved requests against the length of their answers, times FlashAttention's on bf16."""
    axes = figure.subplots()

    def key(row: Row) -> Any:
        case = row["case"]
        if row["metric"] != "output_tokens_per_second" or row["peer"] != "FLASH_ATTN" or case.get("turn") != 1:
            return None
        return _gpu(row), case.get("bytes_percent") or case.get("backend"), case.get("answer_tokens", SHORT_ANSWER)

    rows = newest(results / "engine.jsonl", key)
    lengths = set()
    for gpu, line in GPU_LINES.items():
        for cache, colour in COLOURS.items():
            found = sorted((answer, row["ratio"]) for (g, c, answer), row in rows.items() if (g, c) == (gpu, cache))
            if not found:
                continue
            lengths |= {answer for answer, _ in found}
            label = f"{'fp8' if cache == 'fp8' else f'LEXICO, {cache:g} %'}, {gpu}"
            axes.plot([x for x, _ in found], [y for _, y in found], line, marker="o", color=colour, label=label)
            for x, y in found:
                axes.annotate(f"{y:.2f}", (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.axhline(1, color="0.25", linewidth=0.9, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [f"{length:,}" for length in sorted(lengths)])
    axes.set_xticks([], minor=True)
    axes.margins(x=0.12, y=0.15)
    axes.set(xlabel="tokens per answer", ylabel="tokens per second, times FLASH_ATTN's on bf16")
    axes.set_title("64 cold prompts of 32k, more than bf16 can hold at once", loc="left")
    axes.legend()


def draw_frontier(figure: Any, results: Path) -> None:
    """Quality, times bf16's, against bytes per token: a panel per task."""

    def key(row: Row) -> Any:
        case = row["case"]
        whole = case.get("model") == MODEL and row["metric"] in PANELS and not SIZES & {*case}
        return (row["metric"], case["cache"]) if whole and "cache" in case else None

    rows = newest(results / "quality.jsonl", key)
    _draw_panels(figure.subplots(1, len(PANELS)), PANELS, rows)
    gpus = sorted({_gpu(row) for row in rows.values()})
    words = f"{MODEL} in vLLM on one {' and '.join(gpus)}; red: LEXICO by atoms per vector; bars: 95 %"
    figure.suptitle(words, fontsize=10)


def draw_documents(figure: Any, results: Path) -> None:
    """What is left of long documents: each cache's last row of each task, of the model and GPU that were asked last."""
    path = results / "quality.jsonl"
    (last,) = newest(path, lambda row: True if row["metric"] == "qa" else None).values()

    def key(row: Row) -> Any:
        case = row["case"]
        same = _gpu(row) == _gpu(last) and _short(case.get("model")) == _short(last["case"]["model"])
        whole = row["metric"] in DOCUMENT_PANELS and not SIZES & {*case}
        return (row["metric"], case["cache"]) if same and whole and "cache" in case else None

    rows = newest(path, key)
    *places, words = figure.subplots(2, 3).flatten()
    panels = {metric: title for metric, title in DOCUMENT_PANELS.items() if any(metric == found for found, _ in rows)}
    _draw_panels(places[: len(panels)], panels, rows)
    for place in (*places[len(panels) :], words):
        place.set_axis_off()
    sizes = [f"{metric}: {_sizes(row)}" for metric in panels if (row := rows.get((metric, "bf16")))]
    commits = ", ".join(sorted({row["commit"][:7] for row in rows.values()}))
    about = f"{last['case']['model']}\nin vLLM {last['vllm']} on one {_gpu(last)},\ncommits {commits}\n\n"
    about += (
        "LEXICO in red, by atoms per vector;\na + has atoms dealt out unevenly;\nbars: 95 %; asked in the last run:\n\n"
    )
    words.text(0.05, 0.95, about + "\n".join(sizes), va="top", fontsize=9)


def _short(model: str | None) -> str:
    """A model's name without whose it is, and what it is tuned for."""
    return (model or "").rpartition("/")[2].lower().removesuffix("-instruct")


def _sizes(row: Row) -> str:
    """How much was asked, and of what sizes."""
    given = row["case"]["settings"]
    sizes = given.get("passages") or given.get("pairs") or given.get("lengths")
    return f"{row['case']['count']}" + (f", of {' and '.join(f'{size:,}' for size in sizes)}" if sizes else "")


def _draw_panels(places: Any, panels: dict[str, str], rows: dict[Any, Row]) -> None:
    """A panel per task. rows: by metric and cache."""
    for axes, (metric, title) in zip(places, panels.items(), strict=True):
        families: dict[str, list[Row]] = {}
        for (found, cache), row in rows.items():
            if found == metric and cache != "bf16" and row["case"].get("count", 0) > 1:
                families.setdefault(cache.partition(":")[0].partition("_")[0], []).append(_point(cache, row, metric))
        for family, points in families.items():
            colour, marker = LOOKS_OF[family]
            plain = [point for point in points if not {*"+/"} & {*point["name"]}]
            others = [point for point in points if point not in plain]
            _set_apart(plain, others)
            mark(axes, plain, "-", colour, marker)
            mark(axes, others, "", colour, marker)
            for point in points:
                words = point["name"].removeprefix("lexico:").removeprefix("turboquant_").removesuffix("_nc")
                words = "+" + words.partition("=")[2] if "uneven=" in words else words
                axes.annotate(
                    words, (point["x"], point["y"]), (4, 6), textcoords="offset points", fontsize=8, color=colour
                )
        axes.axhline(1, color="0.25", linewidth=0.9, linestyle=":")
        drawn = [point for points in families.values() for point in points]
        scale_bytes(axes, [point["x"] for point in drawn] + [100.0])
        top = max([1.15, *(1.02 * point["bars"][1] for point in drawn)])
        axes.set(title=f"{title}, times bf16's", xlabel="bytes per token, % of bf16", ylim=(0, top))
        axes.margins(x=0.12)


def _set_apart(plain: list[Row], others: list[Row]) -> None:
    """Move marks that would hide one at the same bytes to its right, one after another."""
    taken = [point["x"] for point in plain]
    for point in others:
        while any(abs(point["x"] / x - 1) < 0.5 * (APART - 1) for x in taken):
            point["x"] *= APART
        taken.append(point["x"])


def _point(cache: str, row: Row, metric: str) -> Row:
    """A mark; perplexity is turned over, so that up is better in every panel."""
    case, ratio = row["case"], row["ratio"]
    low, high = case["ratio_low"] or ratio, case["ratio_high"] or ratio
    if metric == "wikitext":
        ratio, low, high = 1 / ratio, 1 / high, 1 / low
    return {"name": cache, "x": case["bytes_percent"], "y": ratio, "bars": (low, high)}
