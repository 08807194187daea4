"""A benchmark's result is written with everything that is known about it, and with nothing that is not."""

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def recorder(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    return load_benchmark("bench/record")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_rows_are_appended_with_ratio_and_environment(recorder, tmp_path):
    first = recorder.record(
        "engine", {"bytes_percent": 12.5}, "kv_cache_tokens", 700, "FLASH_ATTN", 100, folder=tmp_path
    )
    second = recorder.record("engine", {"tokens": 64}, "decode_ms", 1.5, commit="abc", folder=tmp_path)
    lines = (tmp_path / "engine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [first, second]
    assert first["ratio"] == 7.0
    assert (second["peer"], second["peer_value"], second["ratio"]) == (None, None, None)
    assert second["commit"] == "abc"
    keys = "date commit gpu driver torch triton vllm case metric value peer peer_value ratio"
    assert list(first) == keys.split()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_failed_measurement_is_not_recorded(recorder, tmp_path, value):
    with pytest.raises(ValueError, match="only finite numbers"):
        recorder.record("engine", {}, "decode_ms", value, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_peer_without_a_value_is_refused(recorder, tmp_path):
    with pytest.raises(ValueError, match="both its name and its value"):
        recorder.record("engine", {}, "decode_ms", 1.0, peer="FLASH_ATTN", folder=tmp_path)


def test_a_name_that_leaves_the_folder_is_refused(recorder, tmp_path):
    with pytest.raises(ValueError, match="names a file"):
        recorder.record("../engine", {}, "decode_ms", 1.0, folder=tmp_path)


def test_the_commit_tells_changed_sources_but_not_new_results(recorder, tmp_path):
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("x = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "engine.jsonl").write_text("{}\n")
    assert recorder.find_commit(tmp_path) == head
    (tmp_path / "code.py").write_text("x = 2\n")
    assert recorder.find_commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "COMMIT").write_text("0123abc\n")  # copied sources over another checkout
    assert recorder.find_commit(tmp_path) == "0123abc"


def test_without_git_the_commit_comes_from_a_file_or_is_unknown(recorder, tmp_path):
    assert recorder.find_commit(tmp_path) is None
    (tmp_path / "COMMIT").write_text("0123abc-dirty\n")
    assert recorder.find_commit(tmp_path) == "0123abc-dirty"


def test_what_is_not_installed_has_no_version(recorder):
    assert recorder.version("no-such-distribution-anywhere") is None
    assert recorder.version("no-such-distribution-anywhere", "pytest") == pytest.__version__
