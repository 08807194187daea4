"""Engines that start side by side, each in a process of its own with the GPUs that it is shown."""

from __future__ import annotations

import argparse
import fcntl
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench import parallel_speed
from bench.engine_process import EngineProcess, Run
from bench.record import record

LEAST_SECONDS = 30  # left, to start another engine
LONGEST_WAIT = 90.0  # seconds for a lock; then the process that has it is thought to hang
# NVLink multicast stays off: on some hosts a program that uses it takes the GPUs out of service. It would be of use to
# all backends alike.
ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",  # into the engine's log; what it measures goes to stdout
}
Result = tuple["Job", str, dict[str, Any]]  # of a measure


class Job(NamedTuple):
    """An engine to start.

    name: of its log. measures: what is asked of it, one after another. settings: what its process is given. gpus: those
    that it is shown; () for all.
    """

    name: str
    measures: tuple[str, ...]
    settings: dict[str, Any]
    gpus: tuple[str, ...] = ()


class Kept:
    """Writes rows, says what they mean and remembers what was wrong."""

    def __init__(self, folder: Path, table: str = "parallel") -> None:
        """folder, table: where rows go."""
        self.folder, self.table, self.faults = folder, table, list[str]()
        self._written: set[str] = set()

    def write(self, row: parallel_speed.Row, words: str) -> None:
        """Record a row and print a line about it, once."""
        case, metric, value, peer, peer_value = row
        if (key := repr(row)) not in self._written:
            self._written.add(key)
            record(self.table, case, metric, value, peer, peer_value, folder=self.folder)
            print(words, flush=True)

    def fault(self, words: str) -> None:
        """Something that the exit status must tell."""
        self.faults.append(words)
        print(f"{self.table}: {words}", file=sys.stderr, flush=True)


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Alone among the processes that name the same file, but for one that has it for too long."""
    until = time.monotonic() + LONGEST_WAIT
    with lock.open("w") as file:
        while time.monotonic() < until:
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.05)
        yield


def run_jobs(
    waves: Sequence[Sequence[Job]], script: str, options: argparse.Namespace, deadline: float, kept: Kept
) -> Iterator[Result]:
    """Run waves of engines, each wave's at once; the next wave's processes import while this one's start.

    Args:
        waves: engines by the time at which they run.
        script: the command that serves, see `EngineProcess`.
        options: the command line.
        deadline: of `time.monotonic`; what has not answered by then is ended.
        kept: is told what was not measured.

    Yields:
        What was measured, as it comes.
    """
    processes: list[list[EngineProcess]] = []

    def start(job: Job) -> EngineProcess:
        environment = ENVIRONMENT | ({"CUDA_VISIBLE_DEVICES": ",".join(job.gpus)} if job.gpus else {})
        return EngineProcess(Run(job.name, job.measures), job.settings, options, script, environment)

    try:
        for at, wave in enumerate(waves):
            began = time.monotonic()
            if deadline - began < LEAST_SECONDS:
                kept.fault(f"out of time for {', '.join(job.name for later in waves[at:] for job in later)}")
                return
            processes += [[start(job) for job in later] for later in waves[len(processes) : at + 2]]
            yield from _results(wave, processes[at], min(options.engine_seconds, deadline - began), kept)
            print(f"({', '.join(job.name for job in wave)}: {time.monotonic() - began:.1f} s)", flush=True)
    finally:
        for process in (process for started in processes for process in started):
            process.stop()


def measured(job: Job, process: EngineProcess, seconds: float, kept: Kept) -> Iterator[Result]:
    """What an engine measures, as it comes, for at most so many seconds; what lacks in the end is a fault."""
    missing, began = set(job.measures), time.monotonic()
    try:
        for measure, result, took in process.results(seconds):
            missing.discard(measure)
            print(f"({job.name} {measure}: {took:.1f} s, at {time.monotonic() - began:.1f} s)", flush=True)
            yield job, measure, result
    finally:
        if missing:
            process.complain()
            kept.fault(f"{job.name} has not measured {', '.join(sorted(missing))}; see {process.log}")


def _results(wave: Sequence[Job], processes: Sequence[EngineProcess], seconds: float, kept: Kept) -> Iterator[Result]:
    found: queue.Queue[Result | None] = queue.Queue()

    def read(job: Job, process: EngineProcess) -> None:
        try:
            for result in measured(job, process, seconds, kept):
                found.put(result)
        finally:
            found.put(None)

    threads = [threading.Thread(target=read, args=pair, daemon=True) for pair in zip(wave, processes, strict=True)]
    for thread in threads:
        thread.start()
    for _ in threads:
        while (one := found.get()) is not None:
            yield one
