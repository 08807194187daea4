"""Processes of caches: how they start, and that none outlives what started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LAST_LINES = 12


def start_worker(job: Path, log: Path) -> subprocess.Popen:
    """Start a cache's process, in a session of its own so that what it starts can be ended with it.

    Its standard input is a pipe that closes when this process ends, however that is; see `vllm_lexico.processes`.
    """
    # -P: the folder that the user is in must not hide packages, as a checkout's `kernels` would.
    command = [sys.executable, "-P", "-m", "vllm_lexico.evals.worker", str(job)]
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def last_lines(path: Path, count: int = LAST_LINES) -> str:
    """The end of a log, without empty lines."""
    if not path.exists():
        return "(no log)"
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "\n".join(f"  {line[:300]}" for line in lines[-count:])
