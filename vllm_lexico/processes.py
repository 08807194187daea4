"""Processes that lead a session of their own: that none outlives what started it."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import subprocess
import threading
import time

STOP_SECONDS = 20
POLL_SECONDS = 0.1


def end_with_parent() -> None:
    """In a process that leads a session: end, with all that was started here, as soon as the parent has ended.

    Standard input is a pipe that the parent holds. Nobody writes to it, so it is read to its end only when its other
    side closes, which the system does for a parent that was killed too. Does nothing where standard input is no pipe.
    """
    if not stat.S_ISFIFO(os.fstat(0).st_mode):
        return

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def without_ranks() -> dict[str, str]:
    """This process's environment for one that is no rank of the group that this process belongs to.

    With what tells vLLM of its data-parallel ranks an engine waits for the others, who do not know of it.
    """
    return {name: value for name, value in os.environ.items() if name not in RANKS and not name.startswith("VLLM_DP_")}


def has_ended(process: subprocess.Popen) -> bool:
    """Whether a process has ended. It is not reaped: until `stop` its number, and its group's, are no one else's."""
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # SIGCHLD is ignored here, perhaps inherited so: the system has reaped it
        return True


def stop(process: subprocess.Popen) -> None:
    """End a process that leads a session, and those that it started, also where it has ended and left them behind."""
    if process.returncode is not None:
        return
    if not has_ended(process):
        with contextlib.suppress(ProcessLookupError):  # ended just now, and reaped by the system
            os.killpg(process.pid, signal.SIGTERM)
        until = time.monotonic() + STOP_SECONDS
        while not has_ended(process) and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # a group of nothing but what waits to be reaped
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()
