"""Running caches with processes that only pretend: what is kept, refused, reported and given up."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from vllm_lexico.evals.caches import parse_caches
from vllm_lexico.evals.run import last_lines, run_evaluation
from vllm_lexico.evals.settings import EvalSettings, Gsm8kSettings, NeedleSettings, WikitextSettings

TASKS = ("gsm8k", "wikitext")
# Writes what a worker writes: results of all tasks for lexico, of the first for bf16, and for fp8 only a log.
WORKER = """
    import json, sys, time
    from pathlib import Path
    folder = Path(sys.argv[1]).parent
    job = json.loads(Path(sys.argv[1]).read_text())
    name = job["cache"]["name"]
    print(f"{name} starts", flush=True)
    if name == "fp8":
        sys.exit("ValueError: fp8 cannot be had here")
    if name == "int8_slow":
        time.sleep(600)
    rows = {"gsm8k": '{"id": 0, "strict": 1, "flexible": 1, "tokens": [1]}', "wikitext": '{"id": 0, "loss": 2.0}'}
    held = {"all": {"sequences": 1, "tokens": 5.0, "bytes": 50.0, "bytes_a_token": 10.0}}
    for task in job["tasks"]:
        if name == "bf16" and task == "wikitext":
            (folder / "wikitext.error").write_text("RuntimeError: no logits")
            sys.exit(1)
        (folder / f"{task}.jsonl").write_text(rows[task] + chr(10))
        result = {"task": task, "seconds": 1.0, "start_seconds": 1.0, "token_bytes": 5.0, "plain_token_bytes": 10}
        (folder / f"{task}.json").write_text(json.dumps(result | {"capacity_tokens": 9, "held": held}))
"""


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They are tested elsewhere, and take most of the time."""
    monkeypatch.setattr("vllm_lexico.evals.results.summary.plot_frontier", lambda metrics, path: None)


@pytest.fixture
def start(tmp_path):
    """Starts the pretended worker; `calls` has the caches that were started."""
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))

    def start(job, log):
        start.calls.append(json.loads(job.read_text())["cache"]["name"])
        with log.open("w") as file:
            command = [sys.executable, str(script), str(job)]
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)

    start.calls = []
    return start


def test_a_failed_cache_is_reported_and_the_rest_runs(settings, tmp_path, start, capsys):
    out = tmp_path / "out"
    failures = run_evaluation(settings, parse_caches("fp8,bf16,lexico:15"), TASKS, out, parallel=2, start=start)
    assert sorted(failures) == ["bf16 wikitext", "fp8 gsm8k", "fp8 wikitext"]
    assert "fp8 cannot be had here" in failures["fp8 gsm8k"] and failures["bf16 wikitext"] == "RuntimeError: no logits"
    assert "fp8 failed at gsm8k, wikitext" in capsys.readouterr().out
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["caches"]["lexico:15"]["tasks"]) == set(TASKS)
    assert set(metrics["caches"]["bf16"]["failures"]) == {"wikitext"} and metrics["caches"]["fp8"]["tasks"] == {}


def test_finished_results_are_kept_and_failed_ones_tried_again(settings, tmp_path, start, capsys):
    out, caches = tmp_path / "out", parse_caches("bf16,lexico:15")
    run_evaluation(settings, caches, TASKS, out, start=start)
    before = (out / "lexico-15" / "gsm8k.json").stat().st_mtime_ns
    assert list(run_evaluation(settings, caches, TASKS, out, start=start)) == ["bf16 wikitext"]
    assert start.calls == ["bf16", "lexico:15", "bf16"]
    assert (out / "lexico-15" / "gsm8k.json").stat().st_mtime_ns == before
    assert "3 of 4 results are in" in capsys.readouterr().err
    assert json.loads((out / "bf16" / "job.json").read_text())["tasks"] == ["wikitext"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"gsm8k": Gsm8kSettings(limit=3)}, "gsm8k limit was None, now is 3"),
        ({"model": "org/other"}, "model was 'org/model', now is 'org/other'"),
        ({"engine": {"max_model_len": 512, "dtype": "float32"}}, "engine dtype was None, now is 'float32'"),
    ],
)
def test_other_settings_are_refused_by_name(settings, tmp_path, start, changed, words):
    out, caches = tmp_path / "out", parse_caches("lexico:15")
    run_evaluation(settings, caches, TASKS, out, start=start)
    values = {"model": settings.model, "data": settings.data, "engine": settings.engine} | changed
    with pytest.raises(ValueError, match=words):
        run_evaluation(EvalSettings(**values), caches, TASKS, out, start=start)
    assert len(start.calls) == 1


def test_tasks_without_results_and_memory_may_change(settings, tmp_path, start):
    out, caches = tmp_path / "out", parse_caches("lexico:15")
    run_evaluation(settings, caches, ("gsm8k",), out, start=start)
    engine = {"max_model_len": 512, "gpu_memory_utilization": 0.5}
    other = EvalSettings(settings.model, settings.data, engine, wikitext=WikitextSettings(length=512))
    assert run_evaluation(other, caches, TASKS, out, start=start) == {}
    assert json.loads((out / "config.json").read_text())["tasks"]["wikitext"]["length"] == 512


def test_another_dictionary_is_refused(settings, tmp_path, start):
    out = tmp_path / "out"
    run_evaluation(settings, parse_caches("lexico:15", "one.safetensors"), TASKS, out, start=start)
    with pytest.raises(ValueError, match=r"lexico-15 has results of lexico:15 with .*one.safetensors"):
        run_evaluation(settings, parse_caches("lexico:15", "two.safetensors"), TASKS, out, start=start)


def test_missing_data_is_refused_before_anything_runs(settings, tmp_path, start):
    (tmp_path / "data" / "gsm8k_train.jsonl.xz").unlink()
    with pytest.raises(ValueError, match="lacks gsm8k_train"):
        run_evaluation(settings, parse_caches("bf16"), TASKS, tmp_path / "out", start=start)
    assert not start.calls and not (tmp_path / "out").exists()


def test_a_cache_that_takes_too_long_is_given_up(settings, tmp_path, start):
    caches = parse_caches("int8_slow,lexico:15")
    failures = run_evaluation(settings, caches, TASKS, tmp_path / "out", timeout_seconds=2, start=start)
    assert set(failures.values()) == {"ended after 2 s"} and len(failures) == 2


def test_ended_from_outside_it_ends_its_processes(settings, tmp_path, start):
    processes = []

    def start_slow_and_end(job, log):
        processes.append(start(job, log))
        # Comes while the run waits for the process that it has just begun.
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return processes[0]

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(settings, parse_caches("int8_slow"), TASKS, tmp_path / "out", start=start_slow_and_end)
    assert processes[0].poll() is not None and signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "out" / "metrics.json").exists()


def test_last_lines(tmp_path):
    (tmp_path / "log").write_text("one\n\ntwo\nthree\n")
    assert last_lines(tmp_path / "log", 2) == "  two\n  three" and last_lines(tmp_path / "none") == "(no log)"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Gsm8kSettings(limit=0), "--gsm8k-limit was given as 0"),
        (lambda: WikitextSettings(length=100, skip=99), "--wikitext-skip"),
        (lambda: NeedleSettings(lengths=(10,)), "--needle-lengths was given as 10"),
    ],
)
def test_settings_out_of_range(make, words):
    with pytest.raises(ValueError, match=words):
        make()
