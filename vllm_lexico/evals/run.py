"""Runs every cache in a process of its own, keeps what is finished, and lets no failure stop the rest."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexico_kernels.files import write_whole
from tqdm import tqdm

from vllm_lexico.evals.bar import Bar, Position
from vllm_lexico.evals.caches import Cache
from vllm_lexico.evals.folder import alone_in, missing_tasks, settle
from vllm_lexico.evals.identity import identities
from vllm_lexico.evals.prediction_files import error_path, read_result, result_path
from vllm_lexico.evals.processes import last_lines, start_worker
from vllm_lexico.evals.results.summary import write_summary
from vllm_lexico.evals.settings import EvalSettings
from vllm_lexico.evals.tasks import TASKS
from vllm_lexico.evals.worker import PROGRESS_FILE, read_progress, write_job
from vllm_lexico.processes import has_ended, stop

JOB_FILE, LOG_FILE = "job.json", "log.txt"
POLL_SECONDS = 0.5
Start = Callable[[Path, Path], subprocess.Popen]


@dataclass
class Running:
    """A cache whose process runs. tasks: those that it was asked for; done: how many of them are finished."""

    cache: Cache
    tasks: tuple[str, ...]
    folder: Path
    process: subprocess.Popen
    since: float
    done: int = 0


def run_evaluation(
    settings: EvalSettings,
    caches: Sequence[Cache],
    tasks: tuple[str, ...],
    out: Path,
    *,
    parallel: int = 1,
    timeout_seconds: float | None = None,
    start: Start = start_worker,
) -> dict[str, str]:
    """Run what the folder has no results of yet.

    Args:
        settings: of the evaluation.
        caches, tasks: to evaluate, each with each.
        out: the folder of results.
        parallel: caches at a time.
        timeout_seconds: after which a cache's process is ended.
        start: starts a process for a job's file and its log.

    Returns:
        What failed, "CACHE TASK", and why.

    Raises:
        ValueError: before anything runs: the folder has results of something else, another evaluation runs in it, or
            the tasks' data is not there.
    """
    check_data(settings, tasks)
    with alone_in(out):
        asked = {cache.name: identities(settings, cache, tasks) for cache in caches}
        missing = settle(out, asked)
        jobs = _Jobs(settings, asked, out, start, timeout_seconds)
        waiting = [(cache, missing[cache.name]) for cache in caches if missing[cache.name]]
        total = len(caches) * len(tasks)
        kept = total - sum(len(of_cache) for _, of_cache in waiting)
        if kept:
            print(f"{kept} of {total} results are in {out} already and are kept", file=sys.stderr)
        # Ended from outside, it must end its processes too: each is in a session of its own and would run on.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        with Bar(total, kept) as bar:
            try:
                while waiting or jobs.running:
                    while waiting and len(jobs.running) < parallel:
                        jobs.begin(*waiting.pop(0))
                    time.sleep(POLL_SECONDS)
                    ended = jobs.collect(bar)
                    if ended and (waiting or jobs.running):
                        write_summary(out)
            finally:
                for one in jobs.running:
                    stop(one.process)
                signal.signal(signal.SIGTERM, before)
                write_summary(out)  # of what is finished, also when this was interrupted
    return jobs.failures


class _Jobs:
    """The processes of an evaluation. running: those that have not ended; failures: "CACHE TASK" and why."""

    def __init__(
        self,
        settings: EvalSettings,
        identities: Mapping[str, Mapping[str, Mapping[str, Any]]],
        out: Path,
        start: Start,
        timeout_seconds: float | None,
    ) -> None:
        self.settings, self.identities, self.out = settings, identities, out
        self.start, self.timeout_seconds = start, timeout_seconds
        self.running: list[Running] = []
        self.failures: dict[str, str] = {}

    def begin(self, cache: Cache, tasks: tuple[str, ...]) -> None:
        """Start a cache's process; what its tasks left before is gone, so that nothing old is read as new."""
        folder = self.out / cache.folder
        for task in tasks:
            error_path(folder, task).unlink(missing_ok=True)
            result_path(folder, task).unlink(missing_ok=True)
        (folder / PROGRESS_FILE).unlink(missing_ok=True)
        job = folder / JOB_FILE
        write_job(job, self.settings, cache, {task: self.identities[cache.name][task] for task in tasks})
        process = self.start(job, folder / LOG_FILE)
        self.running.append(Running(cache, tasks, folder, process, time.monotonic()))

    def collect(self, bar: Bar) -> int:
        """Show how far the processes are, and take in those that have ended, or took too long; returns how many."""
        ended = 0
        for one in list(self.running):
            finished = len(one.tasks) - len(missing_tasks(one.folder, one.tasks))
            bar.update(finished - one.done)
            one.done = finished
            limit = self.timeout_seconds
            timed_out = limit is not None and time.monotonic() - one.since > limit
            if not has_ended(one.process) and not timed_out:
                continue
            stop(one.process)
            self.running.remove(one)
            self.failures |= _report(one, f"ended after {limit:g} s" if timed_out else None)
            ended += 1
        bar.show([_position(one) for one in self.running])
        return ended


def check_data(settings: EvalSettings, tasks: Sequence[str]) -> None:
    """Refuse a folder that lacks a file which a task will read."""
    missing = [f for task in tasks for f in TASKS[task].DATA_FILES if not (Path(settings.data) / f).is_file()]
    if missing:
        raise ValueError(
            f"--data {settings.data} lacks {', '.join(missing)}; name the folder that has them, or leave --data out to "
            "have them made from datasets of the Hugging Face hub"
        )


def _position(one: Running) -> Position:
    """A cache and how far it is."""
    progress = read_progress(one.folder)
    if progress is None:
        return Position(f"{one.cache.name} starts")
    return Position(f"{one.cache.name} {progress['task']}", f"{progress['done']}/{progress['total']}")


def _report(one: Running, reason: str | None) -> dict[str, str]:
    """Say what a cache's process left undone and why; the reasons are kept beside its results."""
    failed: dict[str, str] = {}
    log = last_lines(one.folder / LOG_FILE)
    for task in one.tasks:
        path = error_path(one.folder, task)
        try:
            if read_result(one.folder, task) is not None:
                continue
        except ValueError as error:
            write_whole(path, f"{error}\n")
        if not path.exists():
            why = reason or f"the process ended with status {one.process.returncode}; the last lines of its log:\n{log}"
            write_whole(path, why + "\n")
        failed[f"{one.cache.name} {task}"] = path.read_text(encoding="utf-8", errors="replace").strip()
    if failed:
        tasks = ", ".join(name.rpartition(" ")[2] for name in failed)
        tqdm.write(f"{one.cache.name} failed at {tasks}; {one.folder / LOG_FILE} ends with:\n{log}\n")
    return failed
