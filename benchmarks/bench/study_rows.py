"""Rows of `quality_study.py`: what they say of a point, which are there already, and the table of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from lexico_kernels.memory.layout import KV

from bench.study_points import TAIL_STUDIES, Point
from bench.tail_cost import BLOCKS, REQUEST_TOKENS, held_bytes, plain_bytes
from vllm_lexico.dictionary.fingerprint import ModelFingerprint

METRIC = "perplexity_ratio"


def point_case(point: Point, shape: ModelFingerprint) -> dict[str, Any]:
    """What a row says of a point before it is measured."""
    coding = point.coding
    means = [sum(pair[at] for pair in coding.sparsity) / len(coding.sparsity) for at in range(len(KV))]
    case = {
        "study": point.study, "series": point.series, "name": point.name, "x": point.x,
        "sparsity": {part: round(mean, 4) for part, mean in zip(KV, means, strict=True)},
        "by_layer": [list(pair) for pair in coding.sparsity] if len(set(coding.sparsity)) > 1 else None,
        "window": coding.window, "sinks": coding.sinks, "relative_error": coding.relative_error,
        "dictionary": coding.dictionary, "gains": list(coding.gains),
    }  # fmt: skip
    if point.study in TAIL_STUDIES:
        plain, settings = plain_bytes(shape, REQUEST_TOKENS), (coding.sparsity[0], coding.window, coding.sinks)
        held = {block: held_bytes(shape, *settings, block, REQUEST_TOKENS) for block in BLOCKS}
        case["held_percent"] = {str(block): round(100 * size / plain, 4) for block, size in held.items()}
    return case


def finished(folder: Path, commit: str | None) -> list[dict[str, Any]]:
    """Cases of all points that have a row of this commit; none where the commit is not known."""
    path = folder / "quality.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if commit and path.exists() else []
    return [row["case"] for row in rows if row["metric"] == METRIC and row["commit"] == commit]


def write_csv(cases: list[dict[str, Any]], path: Path) -> None:
    """A line for each point."""
    flat = []
    for case in cases:
        line = {name: value for name, value in case.items() if name not in ("by_layer", "dictionary_facts")}
        for name in ("sparsity", "held_percent", "energy_lost"):
            line |= {f"{name}_{key}": value for key, value in line.pop(name, {}).items()}
        flat.append(line)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in flat for name in line)))
        writer.writeheader()
        writer.writerows(flat)
