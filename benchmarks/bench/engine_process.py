"""Engines in processes of their own, which import vLLM at once, start when they are told to, and measure.

A command that measures engines starts itself again with --serve, reads an engine's settings from standard input and
prints each result by `answer`.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ANSWER = "engine="
PASSED_ON = ("shrink", "steps", "answer_tokens", "turns")  # options that an engine's process is told


class Run(NamedTuple):
    """An engine and what is measured in it."""

    engine: str
    measures: tuple[str, ...]


def answer(measure: str, run: Callable[[], dict[str, Any]]) -> None:
    """Print what a measure gives, for `EngineProcess.results`, or its traceback."""
    began, result = time.perf_counter(), None
    try:
        result = run()
    except Exception:
        traceback.print_exc()
    print(f"{ANSWER}{json.dumps([measure, result, time.perf_counter() - began])}", flush=True)


class EngineProcess:
    """A process that imports vLLM at once and serves when it is told to."""

    def __init__(
        self,
        run: Run,
        settings: dict[str, Any],
        options: argparse.Namespace,
        script: str,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it. script: the command that serves, told by --serve; environment: more of it."""
        self.run, self._settings, self._told, self._stopped = run, settings, False, False
        self.log = options.logs / f"{run.engine.replace(' ', '-')}-{'-'.join(run.measures)}.log"
        command = [sys.executable, script, "--serve", "--measure", *run.measures]
        for name in PASSED_ON:
            command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        # An engine's worker imports `bench.uncoded` by its name.
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        with self.log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | {"PYTHONPATH": path} | dict(environment or {}),
                start_new_session=True,  # so that an engine's own processes end with it
            )

    def begin(self) -> None:
        """Tell it the engine's settings, with which it starts; it measures when `results` is asked for."""
        if self._told:
            return
        self._told = True
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # it ended while it imported; its log says why
            self._process.stdin.write(json.dumps(self._settings) + "\n")
            self._process.stdin.flush()

    def answers(self, seconds: float) -> Iterator[tuple[str, dict[str, Any] | None, float]]:
        """What it prints by `answer`, as it comes, for at most so many seconds."""
        timer = threading.Timer(seconds, self._kill)
        timer.start()
        assert self._process.stdout
        try:
            for line in self._process.stdout:
                if line.startswith(ANSWER):
                    measure, result, took = json.loads(line.removeprefix(ANSWER))
                    yield measure, result, took
        finally:
            timer.cancel()

    def results(self, seconds: float) -> Iterator[tuple[str, dict[str, Any], float]]:
        """Have it measure: (measure, result, seconds that it took) as they come, for at most so many seconds."""
        self.begin()
        assert self._process.stdin
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            for measure, result, took in itertools.islice(self.answers(seconds), len(self.run.measures)):
                if result is not None:
                    yield measure, result, took
        finally:
            self.stop()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """End it and all processes that it started, and wait a little for the memory that they had."""
        if self._stopped:
            return
        self._stopped = True
        self._kill()
        self._process.wait()
        for _ in range(50):
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)

    def complain(self) -> None:
        """Print the end of its log."""
        print(f"{self.log.stem} did not finish; the end of {self.log}:", file=sys.stderr)
        print(self.log.read_text(errors="replace")[-2500:], file=sys.stderr, flush=True)
