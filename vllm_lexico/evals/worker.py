"""One cache in a process of its own: `python -m vllm_lexico.evals.worker JOB.json`.

Runs the tasks that the job names one after the other on one engine. A task that fails leaves the last words of why in a
file and does not stop the next; an engine that does not start ends the process.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lexico_kernels.files import write_whole

from vllm_lexico.evals.caches import Cache
from vllm_lexico.evals.engine import Engine
from vllm_lexico.evals.fields import Count, Fields
from vllm_lexico.evals.held import summarize_held
from vllm_lexico.evals.identity import UNKNOWN_AT_FIRST, weights_of
from vllm_lexico.evals.prediction_files import error_path, read_result, write_result
from vllm_lexico.evals.sealed import check, parse, read_bytes
from vllm_lexico.evals.settings import EvalSettings
from vllm_lexico.evals.tasks import TASKS
from vllm_lexico.processes import end_with_parent
from vllm_lexico.train.identity import file_checksum

PROGRESS_FILE = "progress.json"
PROGRESS_SECONDS = 1.0


class ProgressFields(Fields):
    """How far a worker is. task: its name, empty before the first; done, total: sequences."""

    task: str
    done: Count
    total: Count


def write_job(path: Path, settings: EvalSettings, cache: Cache, identities: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what `main` reads; results will lie beside it. identities: what they will belong to, by task."""
    job = {"settings": settings.to_json(), "cache": asdict(cache), "identities": identities}
    write_whole(path, json.dumps(job, indent=1) + "\n")


def read_progress(folder: Path) -> dict[str, Any] | None:
    """How far the worker of a cache's folder is, see `ProgressFields`; None before its first task."""
    path = folder / PROGRESS_FILE
    try:
        progress = parse(read_bytes(path), path)
        check(progress, ProgressFields, path)
    except ValueError:
        return None
    return progress if progress["task"] else None


class Progress:
    """Keeps a file that says how far a task is. A thread writes it: vLLM does not return until all is done."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path, self.engine = path, engine
        self.task, self.total, self.before = "", 0, 0
        engine.expect = self.expect
        threading.Thread(target=self._keep_writing, daemon=True).start()

    def begin(self, task: str) -> None:
        """A task starts; how many sequences it takes it says itself."""
        self.task, self.total, self.before = task, 0, self.engine.meter.finished

    def expect(self, total: int) -> None:
        """The task takes so many sequences."""
        self.total = total

    def _keep_writing(self) -> None:
        while True:
            done = self.engine.meter.finished - self.before
            write_whole(self.path, json.dumps({"task": self.task, "done": done, "total": self.total}))
            time.sleep(PROGRESS_SECONDS)


def main(path: Path) -> int:
    """Run a job; returns 1 when a task failed."""
    job, folder = json.loads(path.read_text(encoding="utf-8")), path.parent
    settings, cache, tasks = EvalSettings.from_json(job["settings"]), Cache(**job["cache"]), job["identities"]
    started = time.perf_counter()
    needed = {task: TASKS[task].needed_tokens(settings) for task in tasks}
    engine = Engine(
        settings,
        cache,
        max(needed.values()),
        with_harness=any(TASKS[task].NEEDS_HARNESS for task in tasks),
    )
    start_seconds = time.perf_counter() - started
    known = {
        "weights": weights_of(settings.model, settings.engine.get("revision")),
        "dictionary": file_checksum(engine.dictionary_path) if engine.dictionary_path else None,
    }
    check_neighbours(folder, known)
    progress = Progress(folder / PROGRESS_FILE, engine)
    failed = False
    for task, identity in tasks.items():
        progress.begin(task)
        try:
            check_length(engine, task, needed[task])
            run_task(engine, settings, folder, identity | known, start_seconds)
        except Exception as error:  # whatever it is, the other tasks still run
            failed = True
            traceback.print_exc()
            write_whole(error_path(folder, task), f"{type(error).__name__}: {error}\n")
    return int(failed)


def check_neighbours(folder: Path, known: Mapping[str, Any]) -> None:
    """Refuse to add to results of other weights or another dictionary; which these are is known once they are loaded.

    Args:
        folder: of the cache.
        known: what UNKNOWN_AT_FIRST names, of the engine that runs.

    Raises:
        ValueError: a result in the folder is of another one.
    """
    for task in TASKS:
        try:
            result = read_result(folder, task)
        except ValueError:  # damaged, and not asked for now
            continue
        before = {name: result.identity[name] for name in UNKNOWN_AT_FIRST} if result is not None else known
        if before != known:
            raise ValueError(
                f"{folder} has results of {before}, the engine has {known}; allowed: the same; give another --out, or "
                f"what the results were made with"
            )


def check_length(engine: Engine, task: str, needed_tokens: int) -> None:
    """Refuse a task that needs longer sequences than the model reads, and that cannot leave those out.

    Raises:
        ValueError: it is one.
    """
    if engine.limited_by_model and engine.max_model_len < needed_tokens and not TASKS[task].LEAVES_SIZES_OUT:
        raise ValueError(
            f"{task} takes sequences of {needed_tokens:,} tokens; allowed: what the model reads, "
            f"{engine.max_model_len:,}; leave it out of --tasks, or give --max-model-len to run what fits"
        )


def run_task(
    engine: Engine, settings: EvalSettings, folder: Path, identity: Mapping[str, Any], start_seconds: float
) -> None:
    """Run a task and write its predictions and what is known of them.

    Args:
        engine: that runs.
        settings: of the evaluation.
        folder: of the cache.
        identity: what the result belongs to, the task among it.
        start_seconds: that the engine took to start.

    Raises:
        ValueError: a prediction is not what it must be, as a loss that is no number.
    """
    task = identity["task"]
    engine.forget()
    engine.meter.take()
    engine.notes.clear()
    started = time.perf_counter()
    rows, held = TASKS[task].run(engine, settings)
    seconds = time.perf_counter() - started
    about = {
        "identity": identity,
        "seconds": round(seconds, 2),
        "start_seconds": round(start_seconds, 2),
        "token_bytes": engine.token_bytes,
        "plain_token_bytes": engine.plain_token_bytes,
        "capacity_tokens": engine.capacity_tokens(),
        "held": {name: summarize_held(ended) for name, ended in held.items()},
        "notes": list(engine.notes),
    }
    write_result(folder, task, about, rows)
    print(f"{task}: {len(rows)} rows in {seconds:.1f} s", flush=True)


if __name__ == "__main__":  # vLLM's worker processes import this module again
    end_with_parent()
    # What waits for a program of a model ends it and removes its folder only where an exception goes by.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main(Path(sys.argv[1])))
