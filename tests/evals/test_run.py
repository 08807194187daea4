"""Running caches with processes that only pretend: what is kept, refused, reported and given up."""

import json
import lzma
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from dataclasses import fields, replace

import pytest

from vllm_lexico import cli
from vllm_lexico.evals.caches import parse_caches
from vllm_lexico.evals.folder import alone_in
from vllm_lexico.evals.identity import differences, identities
from vllm_lexico.evals.run import run_evaluation
from vllm_lexico.evals.settings import (
    ENGINE_FLAGS,
    OTHER_ENGINE_FLAG,
    TASK_FLAGS,
    EvalSettings,
    Gsm8kSettings,
    NeedleSettings,
    WikitextSettings,
)
from vllm_lexico.evals.tasks import TASKS as ALL_TASKS

TASKS = ("gsm8k", "wikitext")
# Writes what a worker writes: results of all tasks for lexico, of the first for bf16, and for fp8 only a log.
WORKER = """
    import hashlib, json, sys, time
    from pathlib import Path
    def sealed(values):
        text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return json.dumps(values | {"sha256": hashlib.sha256(text.encode()).hexdigest()})
    folder = Path(sys.argv[1]).parent
    job = json.loads(Path(sys.argv[1]).read_text())
    name = job["cache"]["name"]
    print(f"{name} starts", flush=True)
    if name == "fp8":
        sys.exit("ValueError: fp8 cannot be had here")
    if name == "int8_slow":
        time.sleep(600)
    rows = {"gsm8k": '{"id": 0, "strict": 1, "flexible": 1, "tokens": [1]}', "wikitext": '{"id": 0, "loss": 2.0}'}
    held = {"all": {"sequences": 1, "tokens": 5.0, "bytes": 50.0, "bytes_per_token": 10.0}}
    for task, identity in job["identities"].items():
        if name == "bf16" and task == "wikitext":
            (folder / "wikitext.error").write_text("RuntimeError: no logits")
            sys.exit(1)
        content = (rows[task] + chr(10)).encode()
        (folder / f"{task}.jsonl").write_bytes(content)
        result = {"identity": identity, "rows": 1, "rows_sha256": hashlib.sha256(content).hexdigest(), "seconds": 1.0}
        result |= {"start_seconds": 1.0, "token_bytes": 5.0, "plain_token_bytes": 10, "capacity_tokens": 9}
        result |= {"held": held}
        (folder / f"{task}.json").write_text(sealed(result))
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
    assert list(json.loads((out / "bf16" / "job.json").read_text())["identities"]) == ["wikitext"]


def test_a_log_is_lines(settings, tmp_path, start, capsys):
    """A bar would write itself anew twice a second."""
    run_evaluation(settings, parse_caches("bf16,lexico:15"), TASKS, tmp_path / "out", start=start)
    said = capsys.readouterr().err
    lines = said.splitlines()
    assert "\r" not in said and "|" not in said and len(lines) <= 8
    assert all(re.match(r"\d of 4 results; ((bf16|lexico:15) starts; )?\d+ s gone", line) for line in lines)
    assert lines[-1].startswith("3 of 4 results; ") and lines[-1].endswith(" s gone")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"gsm8k": Gsm8kSettings(limit=3)}, "--gsm8k-limit was left out, now is 3"),
        ({"wikitext": WikitextSettings(count=2)}, "--wikitext-windows was left out, now is 2"),
        ({"wikitext": WikitextSettings(chunk=64)}, "--chunk-tokens was 128, now is 64"),
        ({"model": "org/other"}, "MODEL was 'org/model', now is 'org/other'"),
        ({"engine": {"max_model_len": 512, "enforce_eager": True}}, "--enforce-eager was left out, now is given"),
        ({"engine": {"max_model_len": 256}}, "--max-model-len was 512, now is 256"),
        ({"engine": {}}, "--max-model-len was 512, now is left out"),
        (
            {"engine": {"max_model_len": 512, "dtype": "float32"}},
            "--engine-arguments dtype was left out, now is 'float32'",
        ),
    ],
)
def test_other_settings_are_refused_by_their_flags(settings, tmp_path, start, changed, words):
    out, caches = tmp_path / "out", parse_caches("lexico:15")
    run_evaluation(settings, caches, TASKS, out, start=start)
    values = {"model": settings.model, "data": settings.data, "engine": settings.engine} | changed
    with pytest.raises(ValueError, match=words):
        run_evaluation(EvalSettings(**values), caches, TASKS, out, start=start)
    assert len(start.calls) == 1


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (NeedleSettings((300, 400), 2, 2), ["--needle-lengths was 300, now is 300 400"]),
        (NeedleSettings((300,), 3, 4, 1), ["--needle-keys was 2, now is 4", "--needle-samples was 2, now is 3"]),
    ],
)
def test_sizes_are_said_as_they_are_typed(settings, changed, words):
    (cache,) = parse_caches("lexico:15")
    was, now = (
        identities(each, cache, ("needle",))["needle"] for each in (settings, replace(settings, needle=changed))
    )
    assert [said for said in differences(was, now) if said.startswith("--")] == words
    assert ("needle seed was 0, now is 1" in differences(was, now)) == (changed.seed == 1)


def test_every_setting_of_a_task_has_a_flag(capsys):
    """But for seeds, which the command line does not take."""
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    options = re.findall(r"--[a-z0-9-]+", capsys.readouterr().out)
    assert {*ENGINE_FLAGS.values(), OTHER_ENGINE_FLAG} <= set(options)
    for task in ALL_TASKS:
        flags = TASK_FLAGS[task]
        assert {*flags, "seed"} == {field.name for field in fields(getattr(EvalSettings("m", "d"), task))} | {"seed"}
        assert set(flags.values()) <= set(options)


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
    with pytest.raises(
        ValueError,
        match=r"configuration: lexico:15 --dictionary was 'one.safetensors', now is 'two.safetensors'; allowed",
    ):
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


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "gsm8k.jsonl").write_text(""),
        lambda folder: (folder / "gsm8k.json").write_text(""),
        lambda folder: (folder / "gsm8k.json").write_text((folder / "gsm8k.json").read_text()[:-40]),
        lambda folder: (folder / "gsm8k.jsonl").write_text('{"id": 0, "strict": 0, "flexible": 1, "tokens": [1]}\n'),
        lambda folder: (folder / "gsm8k.jsonl").unlink(),
    ],
)
def test_a_damaged_result_runs_again(settings, tmp_path, start, capsys, damage):
    out, caches = tmp_path / "out", parse_caches("lexico:15,lexico:7")
    run_evaluation(settings, caches, TASKS, out, start=start)
    damage(out / "lexico-15")
    assert run_evaluation(settings, caches, TASKS, out, start=start) == {}
    assert start.calls == ["lexico:15", "lexico:7", "lexico:15"]
    assert "3 of 4 results are in" in (words := capsys.readouterr().err)
    assert "lexico-15/gsm8k.json" in words and "it runs again now" in words
    assert json.loads((out / "metrics.json").read_text())["caches"]["lexico:15"]["tasks"].keys() == set(TASKS)


@pytest.mark.parametrize("name", ["config.json", "lexico-15/cache.json", "metrics.json"])
@pytest.mark.parametrize("content", ["", "null", "{"])
def test_what_is_derived_is_written_anew(settings, tmp_path, start, name, content):
    out, caches = tmp_path / "out", parse_caches("lexico:15")
    run_evaluation(settings, caches, TASKS, out, start=start)
    before = (out / name).read_text()
    (out / name).write_text(content)
    assert run_evaluation(settings, caches, TASKS, out, start=start) == {}
    assert (out / name).read_text() == before and len(start.calls) == 1


def test_other_data_and_other_weights_are_refused(settings, tmp_path, start):
    out, caches, model = tmp_path / "out", parse_caches("lexico:15"), tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    settings = replace(settings, model=str(model))
    run_evaluation(settings, caches, TASKS, out, start=start)
    (model / "model.safetensors").write_bytes(b"Weights")
    with pytest.raises(ValueError, match=r"results of another configuration: weights was '\w{64}', now is '\w{64}'"):
        run_evaluation(settings, caches, TASKS, out, start=start)
    (model / "model.safetensors").write_bytes(b"weights")
    path = tmp_path / "data" / "gsm8k_train.jsonl.xz"
    path.write_bytes(lzma.compress(lzma.decompress(path.read_bytes()) + b"\n"))
    with pytest.raises(ValueError, match=r"configuration: gsm8k gsm8k_train.jsonl.xz was '\w{64}'"):
        run_evaluation(settings, caches, TASKS, out, start=start)
    assert len(start.calls) == 1


def test_another_content_of_the_dictionary_is_refused(settings, tmp_path, start):
    dictionary = tmp_path / "one.safetensors"
    dictionary.write_bytes(b"atoms")
    caches = parse_caches("lexico:15", str(dictionary))
    run_evaluation(settings, caches, TASKS, tmp_path / "out", start=start)
    dictionary.write_bytes(b"other atoms")
    with pytest.raises(ValueError, match=r"configuration: dictionary was '\w{64}', now is '\w{64}'"):
        run_evaluation(settings, caches, TASKS, tmp_path / "out", start=start)


def test_two_runs_in_one_folder_are_refused(settings, tmp_path, start):
    with alone_in(tmp_path / "out"), pytest.raises(ValueError, match="another evaluation is running in"):
        run_evaluation(settings, parse_caches("lexico:15"), TASKS, tmp_path / "out", start=start)
    assert run_evaluation(settings, parse_caches("lexico:15"), TASKS, tmp_path / "out", start=start) == {}
    assert start.calls == ["lexico:15"]


def test_a_file_is_no_folder(settings, tmp_path, start):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="out is a file; allowed: a folder"):
        run_evaluation(settings, parse_caches("lexico:15"), TASKS, tmp_path / "out", start=start)


@pytest.mark.parametrize("model", ["", "a\nb", "a\x1b[2J"])
def test_names_that_are_none(data, model):
    with pytest.raises(ValueError, match="MODEL was given as"):
        EvalSettings(model, str(data))
