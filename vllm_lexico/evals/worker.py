"""One cache in a process of its own: `python -m vllm_lexico.evals.worker JOB.json`.

Runs the tasks that the job names one after the other on one engine. A task that fails leaves the last words of why in a
file and does not stop the next; an engine that does not start ends the process.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_lexico.evals.caches import Cache
from vllm_lexico.evals.engine import Engine
from vllm_lexico.evals.held import summarize_held
from vllm_lexico.evals.settings import EvalSettings, versions, write_json

PROGRESS_FILE = "progress.json"
PROGRESS_SECONDS = 1.0


def write_job(path: Path, settings: EvalSettings, cache: Cache, tasks: tuple[str, ...]) -> None:
    """Write what `main` reads; results will lie beside it."""
    write_json(path, {"settings": settings.to_json(), "cache": asdict(cache), "tasks": tasks})


def task_module(task: str) -> Any:
    """The module of a task: `run(engine, settings)`, `measures(rows, reference)` and DATA_FILES."""
    return importlib.import_module(f"vllm_lexico.evals.tasks.{task}")


class Progress:
    """Keeps a file that says how far a task is. A thread writes it: vLLM does not come back until all is done."""

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
            write_json(self.path, {"task": self.task, "done": done, "total": self.total})
            time.sleep(PROGRESS_SECONDS)


def main(path: Path) -> int:
    """Run a job; returns 1 when a task failed."""
    job = json.loads(path.read_text(encoding="utf-8"))
    settings, cache = EvalSettings.from_json(job["settings"]), Cache(**job["cache"])
    started = time.perf_counter()
    engine = Engine(settings, cache, job["tasks"])
    start_seconds = time.perf_counter() - started
    progress = Progress(path.parent / PROGRESS_FILE, engine)
    failed = False
    for task in job["tasks"]:
        progress.begin(task)
        try:
            run_task(task, engine, settings, path.parent, start_seconds)
        except Exception as error:  # whatever it is, the other tasks still run
            failed = True
            traceback.print_exc()
            (path.parent / f"{task}.error").write_text(f"{type(error).__name__}: {error}\n", encoding="utf-8")
    return int(failed)


def run_task(task: str, engine: Engine, settings: EvalSettings, folder: Path, start_seconds: float) -> None:
    """Run a task and write its predictions, then its result; the result says that it is finished."""
    (folder / f"{task}.error").unlink(missing_ok=True)
    engine.forget()
    engine.meter.take()
    started = time.perf_counter()
    rows, held = task_module(task).run(engine, settings)
    seconds = time.perf_counter() - started
    with (folder / f"{task}.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    result = {
        "task": task,
        "rows": len(rows),
        "seconds": round(seconds, 2),
        "start_seconds": round(start_seconds, 2),
        "token_bytes": engine.token_bytes,
        "plain_token_bytes": engine.plain_token_bytes,
        "capacity_tokens": engine.capacity_tokens(),
        "held": {name: summarize_held(ended) for name, ended in held.items()},
        "versions": versions(),
    }
    write_json(folder / f"{task}.json", result)
    print(f"{task}: {len(rows)} rows in {seconds:.1f} s", flush=True)


if __name__ == "__main__":  # vLLM's worker processes import this module again
    sys.exit(main(Path(sys.argv[1])))
