"""Processes of caches: nothing that they started outlives them, and they do not outlive what started them."""

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from vllm_lexico.evals.processes import last_lines
from vllm_lexico.processes import has_ended, stop

WAIT_SECONDS = 60
# What `start_worker` starts here in place of Python: a worker that starts a process of its own, and says both numbers.
WORKER = """
    import os, subprocess, sys, time
    from pathlib import Path
    from vllm_lexico.processes import end_with_parent
    end_with_parent()
    child = subprocess.Popen(["sleep", "600"])
    Path(sys.argv[1]).with_name("part").write_text(f"{os.getpid()} {child.pid}")
    Path(sys.argv[1]).with_name("part").rename(sys.argv[1])
    time.sleep(600)
"""
PARENT = """
    import sys, time
    from pathlib import Path
    from vllm_lexico.evals import processes
    processes.sys.executable = sys.argv[1]
    process = processes.start_worker(Path("job.json"), Path(sys.argv[2]))
    time.sleep(600)
"""


def runs(pid):
    """Whether a process has not ended; one that nobody has reaped has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def wait_for(condition):
    until = time.monotonic() + WAIT_SECONDS
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    numbers, fake = tmp_path / "numbers", tmp_path / "python"
    (tmp_path / "worker.py").write_text(textwrap.dedent(WORKER))
    (tmp_path / "parent.py").write_text(textwrap.dedent(PARENT))
    fake.write_text(f"#!/bin/sh\nexec '{sys.executable}' -P '{tmp_path / 'worker.py'}' '{numbers}'\n")
    fake.chmod(0o755)
    parent = subprocess.Popen([sys.executable, "-P", tmp_path / "parent.py", fake, tmp_path / "log.txt"])
    try:
        assert wait_for(numbers.exists), (tmp_path / "log.txt").read_text()
        started = list(map(int, numbers.read_text().split()))
        assert all(map(runs, started))
    finally:
        parent.kill()  # no handler and no `finally` of it runs
        parent.wait()
    assert wait_for(lambda: not any(map(runs, started)))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_stop_ends_what_an_ended_process_left_behind():
    process = subprocess.Popen(
        ["sh", "-c", "sleep 600 >/dev/null & echo $!"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    left = int(process.stdout.readline())
    assert wait_for(lambda: has_ended(process)) and runs(left)
    stop(process)
    assert wait_for(lambda: not runs(left)) and process.returncode == 0
    stop(process)  # again changes nothing


def test_stop_ends_a_process_that_does_not_listen(monkeypatch):
    monkeypatch.setattr("vllm_lexico.processes.STOP_SECONDS", 0.3)
    process = subprocess.Popen(
        ["sh", "-c", "trap '' TERM; echo; while :; do sleep 0.1; done"], stdout=subprocess.PIPE, start_new_session=True
    )
    process.stdout.readline()
    stop(process)
    assert process.returncode == -9


def test_processes_are_stopped_where_the_system_reaps_them():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        ended = subprocess.Popen(["true"], start_new_session=True)
        assert wait_for(lambda: has_ended(ended))
        stop(ended)
        sleeping = subprocess.Popen(["sleep", "600"], start_new_session=True)
        assert not has_ended(sleeping)
        stop(sleeping)
        assert not runs(sleeping.pid) and ended.returncode is not None and sleeping.returncode is not None
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_last_lines(tmp_path):
    (tmp_path / "log").write_text("one\n\ntwo\nthree\n")
    assert last_lines(tmp_path / "log", 2) == "  two\n  three" and last_lines(tmp_path / "none") == "(no log)"
