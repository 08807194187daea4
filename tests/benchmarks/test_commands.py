"""The commands of benchmarks/: each is listed and finds its neighbours, and the pictures of the docs are drawn."""

import os
import re
import subprocess
import sys
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
