"""Starts programs of a model in a process that can do no harm (`child`), and takes their verdicts."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_lexico.evals.sandbox.child import NOBODY

CHILD = Path(__file__).with_name("child.py")
VERDICT_BYTES = 4096
WITHOUT = {
    "network": "programs ran without a network namespace, which this system does not allow: only Python's own sockets "
    "were refused to them",
    "files": "programs ran without a file system of their own, which this system does not allow: writing was refused "
    "to them by Python and by a limit of 0 bytes per file",
    "user": "programs ran as the user of the evaluation, with its capabilities",
}


@dataclass(frozen=True)
class Limits:
    """What a program may take. file_bytes: of a file; folder_bytes: of all files; cpu_seconds: of the processor."""

    cpu_seconds: int = 10
    seconds: float = 30.0
    memory_bytes: int = 1 << 30
    file_bytes: int = 1 << 20
    folder_bytes: int = 4 << 20


@dataclass(frozen=True)
class Layers:
    """What holds programs here, by the names in `child`."""

    names: frozenset[str]

    def missing(self) -> list[str]:
        """In words, what of it this system does not have."""
        return [words for name, words in WITHOUT.items() if name not in self.names]


@dataclass(frozen=True)
class Outcome:
    """How a program ended. reason: why it did not pass; layers: what held it, unknown where it gave no verdict."""

    passed: bool
    reason: str
    layers: frozenset[str] = frozenset()


def find_layers() -> Layers:
    """What holds programs on this system, as one that passes says it.

    Raises:
        RuntimeError: not even that one runs.
    """
    outcome = run_program("import collections, heapq, math, re", ["assert math.gcd(4, 6) == 2"])
    if not outcome.passed:
        raise RuntimeError(f"a program that is right does not run in the sandbox here: {outcome.reason}")
    return Layers(outcome.layers)


def run_program(
    program: str, tests: Sequence[str], limits: Limits | None = None, *, guard: bool = True, namespaces: bool = True
) -> Outcome:
    """Run a program and then its tests, in a process of its own; whatever it does, this returns in time.

    Args:
        program: Python.
        tests: statements that raise where the program is wrong.
        limits: what it may take.
        guard, namespaces: layers to leave out, for tests of the others.
    """
    limits = limits or Limits()
    token = secrets.token_hex(16)  # a program that ends by itself cannot say that it passed
    job = {"program": program, "tests": list(tests), "token": token, "guard": guard, "namespaces": namespaces}
    job["parent"] = os.getpid()
    with tempfile.TemporaryDirectory(prefix="vllm-lexico-program-", ignore_cleanup_errors=True) as folder:
        if os.geteuid() == 0:
            try:
                os.chown(folder, NOBODY, NOBODY)
            except OSError as error:
                if error.errno != errno.EINVAL:  # this: no such user in this user namespace, so the child stays root
                    raise
        said = _run_child(json.dumps(job | asdict(limits)).encode(), folder, limits.seconds)
    if said is None:
        return Outcome(False, f"took more than {limits.seconds:g} s")
    try:
        verdict = json.loads(said)
        if verdict["token"] != token:
            raise ValueError
    except (ValueError, KeyError, TypeError):
        return Outcome(False, "ended without a verdict")
    return Outcome(verdict["passed"], verdict["reason"], frozenset(verdict["layers"]))


def _run_child(job: bytes, folder: str, seconds: float) -> bytes | None:
    """What the child wrote, at most about VERDICT_BYTES; None where it took too long."""
    # PYTHONHASHSEED: sets come in the same order every time. -S: no site-packages. -P: nothing from the folder.
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder, "PYTHONHASHSEED": "0"}
    process = subprocess.Popen(
        [sys.executable, "-s", "-S", "-P", "-B", str(CHILD)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    try:
        return _exchange(process, job, time.monotonic() + seconds)
    finally:
        # Its group ends with it; in a process namespace also what left the group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()  # type: ignore[union-attr]


def _exchange(process: subprocess.Popen, job: bytes, until: float) -> bytes | None:
    """Give a child its job and read what it says until it ends or has said too much; None where that takes too long."""
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(job)
        process.stdin.close()
    said = b""
    while len(said) < VERDICT_BYTES:
        remaining: Any = until - time.monotonic()
        if remaining <= 0 or not select.select([process.stdout], [], [], remaining)[0]:
            return None
        piece = os.read(process.stdout.fileno(), VERDICT_BYTES)
        if not piece:
            break
        said += piece
    return said
