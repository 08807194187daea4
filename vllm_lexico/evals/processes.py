"""Processes of caches: how they start, and that none outlives what started it."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

STOP_SECONDS = 20
POLL_SECONDS = 0.1
LAST_LINES = 12


def start_worker(job: Path, log: Path) -> subprocess.Popen:
    """Start a cache's process, in a session of its own so that what it starts can be ended with it.

    Its standard input is a pipe that closes when this process ends, however that is; see `end_with_parent`.
    """
    # -P: the folder that the user is in must not hide packages, as a checkout's `kernels` would.
    command = [sys.executable, "-P", "-m", "vllm_lexico.evals.worker", str(job)]
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def end_with_parent() -> None:
    """In a process of `start_worker`: end, with all that was started here, as soon as the parent has ended.

    Nobody writes to the pipe, so it is read to its end only when its other side closes, which the system does for a
    parent that was killed too. Does nothing where standard input is no pipe.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def has_ended(process: subprocess.Popen) -> bool:
    """Whether a process has ended. It is not reaped: until `stop` its number, and its group's, are no one else's."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def stop(process: subprocess.Popen) -> None:
    """End a process that leads a session, and those that it started, also where it has ended and left them behind."""
    if process.returncode is not None:
        return
    if not has_ended(process):
        os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        while not has_ended(process) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # a group of nothing but what waits to be reaped
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def last_lines(path: Path, count: int = LAST_LINES) -> str:
    """The end of a log, without empty lines."""
    if not path.exists():
        return "(no log)"
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(f"  {line[:300]}" for line in lines[-count:])
