"""Engines of families that start together, here scripts in place of engines."""

import argparse
import json
import time

import pytest

SCRIPT = """
import json, sys, time
at = json.loads(sys.stdin.readline())
time.sleep(at["start_seconds"])
for name in sys.argv[sys.argv.index("--measure") + 1 : sys.argv.index("--shrink")]:
    began = time.time()
    if name != "started":
        time.sleep(0.3)
    if name == at.get("dies_at"):
        sys.exit(1)
    print("engine=" + json.dumps([name, {"began": began, "ended": time.time()}, 0.0]), flush=True)
    if name == "started":
        sys.stdin.read()
"""


@pytest.fixture
def families(import_benchmark):
    return import_benchmark("families")


@pytest.fixture
def options(tmp_path):
    passed_on = {"shrink": 1, "steps": 1, "answer_tokens": 0, "turns": 0}
    return argparse.Namespace(logs=tmp_path, engine_seconds=30, **passed_on)


def run(families, options, tmp_path, starts, seconds=30, dies_at=(None, None, None)):
    script, kept = tmp_path / "engine.py", families.Kept(tmp_path)
    script.write_text(SCRIPT)
    settings = [{"start_seconds": start, "dies_at": name} for start, name in zip(starts, dies_at, strict=False)]
    jobs = [families.Job(f"engine {at}", ("fit", "decode"), own) for at, own in enumerate(settings)]
    deadline = time.monotonic() + seconds
    return list(families.run_together(jobs, str(script), options, deadline, kept)), kept.faults


def test_engines_measure_in_turn_when_the_last_has_started(families, options, tmp_path):
    before = time.time()
    results, faults = run(families, options, tmp_path, (0.0, 1.0, 0.0))
    assert not faults
    assert [(job.name, name) for job, name, _ in results] == [
        (f"engine {at}", name) for at in range(3) for name in ("fit", "decode")
    ]
    times = [time for _, _, found in results for time in (found["began"], found["ended"])]
    assert times == sorted(times), "two measured at once"
    assert times[0] > before + 1, "one measured while another started"


def test_an_engine_that_does_not_start_is_named_and_the_others_measure(families, options, tmp_path):
    results, faults = run(families, options, tmp_path, (0.0, 60.0), seconds=4)
    assert [(job.name, name) for job, name, _ in results] == [("engine 0", "fit"), ("engine 0", "decode")]
    (fault,) = faults
    assert "engine 1 has not started" in fault


def test_an_engine_that_ends_while_it_measures_is_named_with_what_lacks(families, options, tmp_path):
    results, faults = run(families, options, tmp_path, (0.0, 0.0), dies_at=("decode", None))
    names = [(job.name, name) for job, name, _ in results]
    assert names == [("engine 0", "fit"), ("engine 1", "fit"), ("engine 1", "decode")]
    (fault,) = faults
    assert "engine 0 has not measured decode" in fault


def test_rows_of_other_blocks_say_so_beside_the_same_peer(families, options, tmp_path):
    found = {
        "qwen vLLM": {"fit": {"tokens": 100, "block_size": 544}},
        "qwen LEXICO": {"fit": {"tokens": 500, "block_size": 512}},
        "qwen LEXICO 4096": {"fit": {"tokens": 400, "block_size": 4096}},
    }
    options = argparse.Namespace(shrink=1, cache_gib=8, shape={}, settings={})
    kept = families.Kept(tmp_path, "families")
    for block_size in (0, 4096):
        families.write_rows("qwen", block_size, found, kept, options)
    rows = [json.loads(line) for line in (tmp_path / "families.jsonl").read_text().splitlines()]
    assert [(row["case"]["block_size"], row["value"], row["ratio"]) for row in rows] == [
        (512, 500, 5.0),
        (4096, 400, 4.0),
    ]
