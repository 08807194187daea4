"""metrics.json, frontier.csv and frontier.png of a folder of results, from the predictions in it."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lexico_kernels.files import write_whole
from pydantic import Field

from vllm_lexico.evals.caches import REFERENCE
from vllm_lexico.evals.fields import Count, Fields, NotNegative, Positive, Printable
from vllm_lexico.evals.folder import CacheFolder, Config, read_config, read_folders
from vllm_lexico.evals.prediction_files import AGAIN, Result, error_path
from vllm_lexico.evals.results.frontier import plot_frontier
from vllm_lexico.evals.results.losses import TaskLosses, losses
from vllm_lexico.evals.results.statistics import estimate
from vllm_lexico.evals.sealed import read_sealed, write_sealed
from vllm_lexico.evals.tasks import TASKS

METRICS_FILE, TABLE_FILE, PICTURE_FILE = "metrics.json", "frontier.csv", "frontier.png"
FEW_SAMPLES = 50  # below it an interval of 95 % is wider than what caches differ by
COLUMNS = (
    "cache", "task", "metric", "value", "low", "high", "peer_value", "ratio", "ratio_low", "ratio_high", "lost", "won",
    "count",
    "bytes_per_token", "bytes_percent", "held_bytes_per_token", "held_percent", "sequence_tokens", "seconds",
)  # fmt: skip


class MeasureFields(Fields):
    """A figure: see `estimate`, and what the sequences held that it is of. Optional ones are null and not absent."""

    metric: Printable
    kind: Printable
    case: dict[Printable, Printable | Count]
    count: Count
    value: NotNegative
    low: NotNegative | None
    high: NotNegative | None
    peer_value: NotNegative | None
    ratio: NotNegative | None
    ratio_low: NotNegative | None
    ratio_high: NotNegative | None
    lost: Count | None = None
    won: Count | None = None
    held_bytes_per_token: NotNegative | None
    held_percent: NotNegative | None
    sequence_tokens: NotNegative | None


class TaskFields(Fields):
    """The figures of a cache at a task."""

    seconds: NotNegative
    start_seconds: NotNegative
    capacity_tokens: Count
    notes: list[Printable] = Field(default_factory=list)
    measures: list[MeasureFields]


class CacheMetrics(Fields):
    """The figures of a cache, and why tasks failed."""

    family: Printable
    engine: dict[Printable, Any]
    bytes_per_token: Positive | None
    bytes_percent: Positive | None
    tasks: dict[Printable, TaskFields]
    failures: dict[Printable, str]


class Metrics(Fields):
    """What metrics.json has; see `collect`.

    few_samples: of tasks with too few to tell caches apart by; losses: of LEXICO's caches, by task.
    """

    config: Config
    reference: Printable
    few_samples: dict[Printable, Count] = Field(default_factory=dict)
    caches: dict[Printable, CacheMetrics]
    losses: dict[Printable, TaskLosses] = Field(default_factory=dict)


def write_summary(out: Path) -> dict[str, Any]:
    """Compute all figures anew, write the three files and return the metrics.

    The picture is left out with a note where it cannot be drawn, so that numbers never wait for matplotlib.
    """
    metrics = collect(out)
    write_sealed(out / METRICS_FILE, metrics)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(flat_rows(metrics))
    write_whole(out / TABLE_FILE, table.getvalue())
    if any(True for _ in flat_rows(metrics)):
        try:
            plot_frontier(metrics, out / PICTURE_FILE)
        except ValueError as error:
            print(f"vllm-lexico: no picture: {error}", file=sys.stderr)
    return metrics


def read_metrics(out: Path) -> dict[str, Any]:
    """What `write_summary` wrote; ValueError where it wrote nothing, or the file is damaged."""
    path = out / METRICS_FILE
    if not path.is_file():
        raise ValueError(f"{out} has no {METRICS_FILE}; name the --out folder of an evaluation that was run")
    try:
        metrics = read_sealed(path, Metrics)
        for name, cache in metrics["caches"].items():
            if cache["tasks"].keys() - metrics["config"]["tasks"].keys() or (
                cache["tasks"] and not cache["bytes_percent"]
            ):
                raise ValueError(f"{path} is damaged: it lacks the settings of a task or the bytes of {name}")
    except ValueError as error:
        raise ValueError(f"{error}; {AGAIN}") from error
    return metrics


def collect(out: Path) -> dict[str, Any]:
    """Everything that the folder knows, by cache and task; caches from most to fewest bytes per token.

    Results that cannot be trusted are among what failed.
    """
    folders = {folder.cache.name: folder for folder in read_folders(out)}
    reference = folders[REFERENCE].results if REFERENCE in folders else {}
    found = {name: _cache_metrics(folder, reference) for name, folder in folders.items()}
    # Those that never ran have no bytes and come last.
    order = sorted(found, key=lambda name: (-(found[name]["bytes_percent"] or 0), name))
    caches, few = {name: found[name] for name in order}, _few_samples(found.values())
    return {
        "config": read_config(out),
        "reference": REFERENCE,
        "few_samples": few,
        "caches": caches,
        "losses": losses(caches, few),
    }


def _few_samples(caches: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """The samples of each task that has fewer than FEW_SAMPLES."""
    counts: dict[str, int] = {}
    for cache in caches:
        for task, of_task in cache["tasks"].items():
            count = max((measure["count"] for measure in of_task["measures"]), default=0)
            counts[task] = max(count, counts.get(task, 0))
    return {task: counts[task] for task in TASKS if counts.get(task, FEW_SAMPLES) < FEW_SAMPLES}


def _cache_metrics(folder: CacheFolder, reference: Mapping[str, Result]) -> dict[str, Any]:
    found: dict[str, Any] = {"family": folder.cache.family, "engine": folder.cache.engine, "tasks": {}, "failures": {}}
    found |= {"bytes_per_token": None, "bytes_percent": None}
    for task in TASKS:
        path = error_path(folder.path, task)
        if task in folder.results:
            about = folder.results[task].about
            found["bytes_per_token"] = about["token_bytes"]
            found["bytes_percent"] = 100 * about["token_bytes"] / about["plain_token_bytes"]
            found["tasks"][task] = task_metrics(task, folder.results[task], reference.get(task))
        elif task in folder.damaged:
            found["failures"][task] = folder.damaged[task]
        elif path.is_file():
            found["failures"][task] = path.read_text(encoding="utf-8", errors="replace").strip()
    return found


def task_metrics(task: str, result: Result, reference: Result | None) -> dict[str, Any]:
    """The figures of a task, see `TaskFields`. reference: the same task of the cache that this one is compared with."""
    about, others = result.about, reference.rows if reference else None
    peers = {measure.name: measure for measure in TASKS[task].measures(others, others)} if others else {}
    measures = []
    for measure in TASKS[task].measures(result.rows, others):
        size = next(iter(measure.case.values()), "all")  # a length in tokens, a number of passages or pairs
        held = about["held"].get(str(size), about["held"]["all"])
        of_token = held["bytes_per_token"]
        plain = held.get("plain_bytes_per_token") or about["plain_token_bytes"]
        measures.append(
            {"metric": measure.name, "kind": measure.kind, "case": dict(measure.case)}
            | estimate(measure, peers.get(measure.name))
            | {
                "held_bytes_per_token": of_token,
                "held_percent": 100 * of_token / plain if of_token else None,
                "sequence_tokens": held["tokens"],
            }
        )
    kept = {name: about[name] for name in ("seconds", "start_seconds", "capacity_tokens")}
    return kept | {"notes": about.get("notes", []), "measures": measures}


def flat_rows(metrics: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """One row per cache and measure, with the columns of the CSV and what the cache and the measure are."""
    for name, cache in metrics["caches"].items():
        for task, result in cache["tasks"].items():
            about = {"cache": name, "family": cache["family"], "task": task, "seconds": result["seconds"]}
            about |= {key: cache[key] for key in ("bytes_per_token", "bytes_percent")}
            for measure in result["measures"]:
                yield about | measure
