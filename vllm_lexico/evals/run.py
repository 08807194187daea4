"""Runs every cache in a process of its own, keeps what is finished, and lets no failure stop the rest."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from vllm_lexico.evals.caches import Cache
from vllm_lexico.evals.results.summary import write_summary
from vllm_lexico.evals.settings import TASKS, EvalSettings, settle, write_json
from vllm_lexico.evals.worker import PROGRESS_FILE, task_module, write_job

JOB_FILE, LOG_FILE, CACHE_FILE = "job.json", "log.txt", "cache.json"
POLL_SECONDS = 0.5
STOP_SECONDS = 20
LAST_LINES = 12
Start = Callable[[Path, Path], subprocess.Popen]


@dataclass
class Running:
    """A cache whose process runs. tasks: those that it was asked for."""

    cache: Cache
    tasks: tuple[str, ...]
    folder: Path
    process: subprocess.Popen
    since: float
    done: int = 0


def start_worker(job: Path, log: Path) -> subprocess.Popen:
    """Start a cache's process, in a session of its own so that what it starts can be ended with it."""
    # -P: the folder that the user is in must not hide packages, as a checkout's `kernels` would.
    command = [sys.executable, "-P", "-m", "vllm_lexico.evals.worker", str(job)]
    with log.open("w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


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

    parallel: caches at a time. timeout_seconds: after which a cache's process is ended. start: starts a process for a
    job's file and its log.

    Returns what failed, "CACHE TASK", and why. ValueError before anything runs if the folder has results of other
    settings or the tasks' data is not there.
    """
    check_data(settings, tasks)
    check_caches(out, caches)
    settle(out, settings, tasks)
    waiting = [(cache, missing) for cache in caches if (missing := missing_tasks(out / cache.folder, tasks))]
    kept = len(caches) * len(tasks) - sum(len(missing) for _, missing in waiting)
    if kept:
        print(f"{kept} of {len(caches) * len(tasks)} results are in {out} already and are kept", file=sys.stderr)
    failures: dict[str, str] = {}
    running: list[Running] = []
    shown = ""
    # Ended from outside, it must end its processes too: each is in a session of its own and would run on.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tqdm(total=len(caches) * len(tasks), initial=kept, unit="result", smoothing=0) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < parallel:
                    running.append(_begin(*waiting.pop(0), settings, out, start))
                time.sleep(POLL_SECONDS)
                for one in list(running):
                    finished = len(one.tasks) - len(missing_tasks(one.folder, one.tasks))
                    if finished != one.done:
                        bar.update(finished - one.done)
                        one.done = finished
                    timed_out = timeout_seconds is not None and time.monotonic() - one.since > timeout_seconds
                    if one.process.poll() is None and not timed_out:
                        continue
                    stop(one.process)
                    running.remove(one)
                    failures |= _report(one, f"ended after {timeout_seconds:g} s" if timed_out else None)
                    if waiting or running:
                        write_summary(out)
                words = "; ".join(map(_describe, running))
                if words != shown:
                    bar.set_postfix_str(words)
                    shown = words
                elif sys.stderr.isatty():
                    bar.refresh()  # the clock; a file would only grow
        finally:
            for one in running:
                stop(one.process)
            signal.signal(signal.SIGTERM, before)
            write_summary(out)  # of what is finished, also when this was interrupted
    return failures


def check_data(settings: EvalSettings, tasks: Sequence[str]) -> None:
    """Refuse a folder that lacks a file which a task will read."""
    missing = [f for task in tasks for f in task_module(task).DATA_FILES if not (Path(settings.data) / f).is_file()]
    if missing:
        raise ValueError(f"--data {settings.data} lacks {', '.join(missing)}; name the folder that has them")


def check_caches(out: Path, caches: Sequence[Cache]) -> None:
    """Refuse results of a cache that had other settings under the same name, as another --dictionary."""
    for cache in caches:
        path = out / cache.folder / CACHE_FILE
        if not path.exists() or missing_tasks(path.parent, TASKS) == TASKS:
            continue
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != json.loads(json.dumps(asdict(cache))):
            raise ValueError(
                f"{path.parent} has results of {before['name']} with {before['engine']}, asked for is {cache.engine}; "
                f"allowed: the same; give another --out, or what the results were made with"
            )


def missing_tasks(folder: Path, tasks: Sequence[str]) -> tuple[str, ...]:
    """Tasks that have no result in a cache's folder."""
    return tuple(task for task in tasks if not (folder / f"{task}.json").exists())


def stop(process: subprocess.Popen) -> None:
    """End a process and those that it started."""
    if process.poll() is not None:
        return
    for how in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, how)
        try:
            process.wait(STOP_SECONDS)
            return
        except subprocess.TimeoutExpired:
            continue


def _begin(cache: Cache, tasks: tuple[str, ...], settings: EvalSettings, out: Path, start: Start) -> Running:
    folder = out / cache.folder
    folder.mkdir(parents=True, exist_ok=True)
    for task in tasks:  # why it failed before must not be read as why it fails now
        (folder / f"{task}.error").unlink(missing_ok=True)
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    write_json(folder / CACHE_FILE, asdict(cache))
    write_job(folder / JOB_FILE, settings, cache, tasks)
    return Running(cache, tasks, folder, start(folder / JOB_FILE, folder / LOG_FILE), time.monotonic())


def _describe(one: Running) -> str:
    """A cache and how far it is."""
    try:
        progress = json.loads((one.folder / PROGRESS_FILE).read_text())
    except (OSError, json.JSONDecodeError):
        progress = {"task": None}
    if not progress["task"]:
        return f"{one.cache.name} starts"
    return f"{one.cache.name} {progress['task']} {progress['done']}/{progress['total']}"


def _report(one: Running, reason: str | None) -> dict[str, str]:
    """Say what a cache's process left undone and why; the reasons are kept beside its results."""
    failed = missing_tasks(one.folder, one.tasks)
    log = last_lines(one.folder / LOG_FILE)
    for task in failed:
        path = one.folder / f"{task}.error"
        if not path.exists():
            why = reason or f"the process ended with status {one.process.returncode}; the last lines of its log:\n{log}"
            path.write_text(why + "\n", encoding="utf-8")
    if failed:
        tqdm.write(f"{one.cache.name} failed at {', '.join(failed)}; {one.folder / LOG_FILE} ends with:\n{log}\n")
    return {f"{one.cache.name} {task}": (one.folder / f"{task}.error").read_text().strip() for task in failed}


def last_lines(path: Path, count: int = LAST_LINES) -> str:
    """The end of a log, without empty lines."""
    if not path.exists():
        return "(no log)"
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(f"  {line[:300]}" for line in lines[-count:])
