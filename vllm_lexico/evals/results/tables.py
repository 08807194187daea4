"""The tables of an evaluation in Markdown, from its metrics.json alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_lexico.evals.results.losses import loss_lines
from vllm_lexico.evals.results.summary import flat_rows

# Columns of the first table: metric, heading, whether the ratio is shown rather than the figure, decimals.
OVERVIEW = (
    ("qa", "questions about passages", False, 3),
    ("pairs", "values of keys", False, 3),
    ("code", "programs", False, 3),
    ("gsm8k", "GSM8K", False, 3),
    ("wikitext", "perplexity, times bf16's", True, 4),
    ("needle", "needles found", False, 3),
    ("agreement_tokens", "tokens until the answer leaves bf16's", False, 1),
)
LESS_IS_BETTER = ("wikitext",)
OURS = "lexico"


def report(metrics: Mapping[str, Any]) -> str:
    """All tables: the overview, where another cache is above LEXICO, each metric, and what failed."""
    rows = list(flat_rows(metrics))
    config = metrics["config"]
    versions = ", ".join(f"{name} {version}" for name, version in config["versions"].items() if version)
    parts = [f"## {Path(config['model']).name}\n\n{versions}.", overview(metrics)]
    if rows:
        above = "\n".join(f"- {words}" for words in dominating(metrics)) or "Nowhere in these figures."
        parts.append(f"### Where another cache is above\n\n{above}")
    for metric in dict.fromkeys(row["metric"] for row in rows):
        parts.append(f"### {metric}\n\n" + metric_table([row for row in rows if row["metric"] == metric]))
    failures = [
        f"- {name}, {task}: `{_last_line(why)}`"
        for name, cache in metrics["caches"].items()
        for task, why in cache["failures"].items()
    ]
    if failures:
        parts.append("### Failed\n\n" + "\n".join(failures))
    if lines := loss_lines(metrics):
        parts.append("\n".join(["### What is lost\n", lines[0], "", *lines[1:]]))
    return "\n\n".join(parts) + "\n"


def overview(metrics: Mapping[str, Any]) -> str:
    """One line per cache, one column per task; below it what tasks have few samples, and what results note.

    A sentence in place of the table where no cache has a result.
    """
    rows = {(row["cache"], row["metric"]): row for row in flat_rows(metrics)}
    shown = [column for column in OVERVIEW if any(metric == column[0] for _, metric in rows)]
    head = ["cache", "bytes per token", "% of 16 bits", *(heading for _, heading, _, _ in shown)]
    lines = []
    for name, cache in metrics["caches"].items():
        if cache["bytes_per_token"] is None:
            continue
        cells = [f"`{name}`", f"{cache['bytes_per_token']:,.0f}", f"{cache['bytes_percent']:.2f}"]
        for metric, _, as_ratio, digits in shown:
            row = rows.get((name, metric))
            names = ("ratio", "ratio_low", "ratio_high") if as_ratio else ("value", "low", "high")
            value, low, high = (None, None, None) if row is None else (row[name] for name in names)
            text = "" if value is None else _interval(value, low, high, digits)
            if row is not None and not as_ratio and row["ratio"] is not None:
                text += f", {row['ratio']:.3f} of bf16"
            cells.append(text)
        lines.append(cells)
    if not lines:
        return "No cache has a result."
    return "\n\n".join([table(head, lines), *few_samples(metrics), *_notes(metrics)])


def _notes(metrics: Mapping[str, Any]) -> list[str]:
    """What the results of tasks say that a user has to know, each once."""
    of_caches = (task.get("notes", []) for cache in metrics["caches"].values() for task in cache["tasks"].values())
    notes = dict.fromkeys(note for of_task in of_caches for note in of_task)
    return ["\n".join(f"- {note}." for note in notes)] if notes else []


def few_samples(metrics: Mapping[str, Any]) -> list[str]:
    """A sentence where tasks have few samples, or nothing."""
    if not (few := metrics.get("few_samples")):
        return []
    counts = ", ".join(f"{task} {count}" for task, count in few.items())
    return [f"Few samples ({counts}): these figures show what is broken, and do not tell caches apart."]


def metric_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """All that is known of one metric."""
    head = ["cache", "% of 16 bits", "held, %", "tokens", "samples", "value (95 %)", "times bf16 (95 %)"]
    head += ["lost : won", "s"]
    lines = []
    for row in rows:
        digits = 1 if row["metric"] == "agreement_tokens" else 4
        ratio = _interval(row["ratio"], row["ratio_low"], row["ratio_high"], 4) if row["ratio"] is not None else ""
        lines.append(
            [
                f"`{row['cache']}`",
                f"{row['bytes_percent']:.2f}",
                f"{row['held_percent']:.2f}" if row["held_percent"] else "",
                f"{row['sequence_tokens']:,.0f}" if row["sequence_tokens"] else "",
                f"{row['count']:,}",
                _interval(row["value"], row["low"], row["high"], digits),
                ratio,
                "" if row.get("lost") is None else f"{row['lost']} : {row.get('won')}",
                f"{row['seconds']:.0f}",
            ]
        )
    return table(head, lines)


def dominating(metrics: Mapping[str, Any]) -> Iterable[str]:
    """In words: caches of others that are better than one of LEXICO's at as many bytes per token, or fewer."""
    rows = [row for row in flat_rows(metrics) if row["metric"] in [column[0] for column in OVERVIEW]]
    for own in (row for row in rows if row["family"] == OURS):
        for other in rows:
            if other["metric"] != own["metric"] or other["family"] in (OURS, metrics["reference"]):
                continue
            sign = -1 if own["metric"] in LESS_IS_BETTER else 1
            if other["bytes_percent"] <= own["bytes_percent"] and sign * other["value"] > sign * own["value"]:
                yield (
                    f"{own['metric']}: `{other['cache']}` ({other['bytes_percent']:.2f} %) has {other['value']:.4g}, "
                    f"`{own['cache']}` ({own['bytes_percent']:.2f} %) has {own['value']:.4g}"
                )


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _last_line(text: str) -> str:
    """The end of what a log or an error says, as a terminal may show it."""
    line = (text.strip().splitlines() or ["(no reason was kept)"])[-1]
    return "".join(letter if letter.isprintable() else " " for letter in line).strip()[:200]


def _interval(value: float, low: float | None, high: float | None, digits: int) -> str:
    bounds = "" if low is None or high is None else f" ({low:.{digits}f} to {high:.{digits}f})"
    return f"{value:.{digits}f}{bounds}"
