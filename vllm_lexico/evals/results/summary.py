"""metrics.json, frontier.csv and frontier.png of a folder of results, from the predictions in it."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_lexico.evals.caches import REFERENCE, Cache
from vllm_lexico.evals.results.frontier import plot_frontier
from vllm_lexico.evals.results.statistics import estimate
from vllm_lexico.evals.settings import CONFIG_FILE, TASKS, write_json
from vllm_lexico.evals.worker import task_module

METRICS_FILE, TABLE_FILE, PICTURE_FILE = "metrics.json", "frontier.csv", "frontier.png"
COLUMNS = (
    "cache", "task", "metric", "value", "low", "high", "peer_value", "ratio", "ratio_low", "ratio_high", "count",
    "bytes_a_token", "bytes_percent", "held_bytes_a_token", "held_percent", "sequence_tokens", "seconds",
)  # fmt: skip


def write_summary(out: Path) -> dict[str, Any]:
    """Compute all figures anew, write the three files and return the metrics.

    The picture is left out with a note where it cannot be drawn, so that numbers never wait for matplotlib.
    """
    metrics = collect(out)
    write_json(out / METRICS_FILE, metrics)
    with (out / TABLE_FILE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(flat_rows(metrics))
    if any(True for _ in flat_rows(metrics)):
        try:
            plot_frontier(metrics, out / PICTURE_FILE)
        except ValueError as error:
            print(f"vllm-lexico: no picture: {error}", file=sys.stderr)
    return metrics


def read_metrics(out: Path) -> dict[str, Any]:
    """What `write_summary` wrote; ValueError where it wrote nothing."""
    path = out / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{out} has no {METRICS_FILE}; name the --out folder of an evaluation that was run")
    return json.loads(path.read_text(encoding="utf-8"))


def collect(out: Path) -> dict[str, Any]:
    """Everything that the folder knows, by cache and task; caches from most to fewest bytes a token."""
    config = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
    folders = {}
    for path in sorted(out.glob("*/cache.json")):
        cache = Cache(**json.loads(path.read_text(encoding="utf-8")))
        folders[cache.name] = (cache, path.parent)
    reference = folders[REFERENCE][1] if REFERENCE in folders else None
    found = {name: _cache_metrics(cache, folder, reference) for name, (cache, folder) in folders.items()}
    # Those that never ran have no bytes and come last.
    order = sorted(found, key=lambda name: (-(found[name]["bytes_percent"] or 0), name))
    return {"config": config, "reference": REFERENCE, "caches": {name: found[name] for name in order}}


def _cache_metrics(cache: Cache, folder: Path, reference: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {"family": cache.family, "engine": cache.engine, "tasks": {}, "failures": {}}
    found |= {"bytes_a_token": None, "bytes_percent": None}
    for task in TASKS:
        result_path, error_path = folder / f"{task}.json", folder / f"{task}.error"
        if result_path.exists():
            result = json.loads(result_path.read_text(encoding="utf-8"))
            found["bytes_a_token"] = result["token_bytes"]
            found["bytes_percent"] = 100 * result["token_bytes"] / result["plain_token_bytes"]
            found["tasks"][task] = _task_metrics(task, result, folder, reference)
        elif error_path.exists():
            found["failures"][task] = error_path.read_text(encoding="utf-8").strip()
    return found


def _task_metrics(task: str, result: Mapping[str, Any], folder: Path, reference: Path | None) -> dict[str, Any]:
    module, rows = task_module(task), _rows(folder / f"{task}.jsonl")
    others = reference and (reference / f"{task}.json").exists() and _rows(reference / f"{task}.jsonl")
    peers = {measure.name: measure for measure in module.measures(others, others)} if others else {}
    plain, measures = result["plain_token_bytes"], []
    for measure in module.measures(rows, others or None):
        held = result["held"].get(str(measure.case.get("length", "all")), result["held"]["all"])
        measures.append(
            {"metric": measure.name, "kind": measure.kind, "case": dict(measure.case)}
            | estimate(measure, peers.get(measure.name))
            | {
                "held_bytes_a_token": held["bytes_a_token"],
                "held_percent": 100 * held["bytes_a_token"] / plain if held["bytes_a_token"] else None,
                "sequence_tokens": held["tokens"],
            }
        )
    kept = {name: result[name] for name in ("seconds", "start_seconds", "capacity_tokens")}
    return kept | {"measures": measures}


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def flat_rows(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row for each cache and measure, with the columns of the CSV and what the cache and the measure are."""
    for name, cache in metrics["caches"].items():
        for task, result in cache["tasks"].items():
            about = {"cache": name, "family": cache["family"], "task": task, "seconds": result["seconds"]}
            about |= {key: cache[key] for key in ("bytes_a_token", "bytes_percent")}
            for measure in result["measures"]:
                yield about | measure
