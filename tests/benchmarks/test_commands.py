"""The commands of benchmarks/: each is listed and finds its neighbours, and the pictures of the docs are drawn."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def commands(root: Path) -> dict[str, str]:
    """The source of every command, by its file's name."""
    return {path.name: path.read_text(encoding="utf-8") for path in (root / "benchmarks").glob("*.py")}


def test_every_command_is_listed_with_what_it_needs(root: Path, commands):
    listed = re.findall(r"^\| `(\w+\.py)` \|", (root / "benchmarks" / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == sorted(commands)


def test_every_command_says_how_it_is_run_and_finds_its_neighbours(commands):
    for name, source in commands.items():
        assert f"python benchmarks/{name}" in source, name
        start = source.index("sys.path.insert(0, str(Path(__file__).parent))")
        assert start < source.index("from bench"), name


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_a_command_runs_with_and_without_the_safe_path(root: Path, tmp_path, safe_path):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment |= {"PYTHONSAFEPATH": safe_path} if safe_path else {}
    drawn = ("pages", "frontier", "quality_frontier")
    command = [sys.executable, root / "benchmarks" / "pictures.py", *drawn, "--out", tmp_path]
    result = subprocess.run(list(map(str, command)), env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.png" for name in drawn}


def test_pictures_of_the_docs_are_those_that_are_drawn(root: Path, import_benchmark):
    drawn = {f"{name}.png" for name in import_benchmark("pictures").PICTURES}
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    shown = {
        (page.parent / link).resolve()
        for page in pages
        for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    assert all(path.is_file() for path in shown), [path for path in shown if not path.is_file()]
    assert drawn <= {path.name for path in shown}


def test_curves_show_the_newest_row_of_each_case(root: Path, import_benchmark, tmp_path):
    import_benchmark("pictures")
    from bench import curves

    rows = '{"at": 1, "value": 2}\n{"at": 2, "value": 5}\n{"at": 1, "value": 3}\n{"at": null}\n'
    (tmp_path / "some.jsonl").write_text(rows)
    newest = curves.newest(tmp_path / "some.jsonl", lambda row: row["at"])
    assert {at: row["value"] for at, row in newest.items()} == {1: 3, 2: 5}


def test_links_of_the_docs_lead_somewhere(root: Path):
    pages = [*root.glob("*.md"), *(root / "docs").rglob("*.md"), *(root / "benchmarks").glob("*.md")]
    for page in pages:
        for link in re.findall(r"(?<!!)\[[^\]]*\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


STARTS = re.compile(r"Popen|EngineProcess|run_jobs")  # processes, by a command
TERMINATED = """
import subprocess, sys
sys.path.insert(0, sys.argv.pop(1))
import first_start
server = [sys.executable, "-c", "import os, time; print('up', os.getpid(), flush=True); time.sleep(600)"]
own = subprocess.Popen
first_start.subprocess.Popen = lambda command, **more: own(server, **more)
first_start.main()
"""


def test_commands_that_start_processes_end_orderly_when_they_are_terminated(commands):
    starting = [name for name, source in commands.items() if STARTS.search(source)]
    assert {"first_start.py", "families.py", "training.py"} <= set(starting)
    assert [name for name in starting if "end_orderly()" not in commands[name]] == []


def test_a_terminated_benchmark_leaves_no_process(root: Path, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"rope_theta": 10000.0}')
    command = [sys.executable, "-c", TERMINATED, root / "benchmarks", tmp_path / "model", "--name", "a/b"]
    command += ["--logs", tmp_path, "--out", tmp_path]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, until = tmp_path / "bf16-first.log", time.monotonic() + 60
    while not (log.exists() and "up" in log.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    number = int(log.read_text().split()[1])
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(number, 0)
