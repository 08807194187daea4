"""Results on disk: whole or refused. Files that were cut, changed or belong elsewhere, and 3,000 mutations of them."""

import hashlib
import json
import math
import shutil

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vllm_lexico import cli
from vllm_lexico.evals.folder import read_folders
from vllm_lexico.evals.prediction_files import read_result
from vllm_lexico.evals.results import statistics
from vllm_lexico.evals.results.summary import collect, read_metrics, task_metrics, write_summary
from vllm_lexico.evals.results.tables import report

CACHES = (("bf16", 1.0, 1000.0), ("lexico:15", 0.8, 125.0))
TASKS = ("gsm8k", "wikitext", "needle")
FILES = [f"{task}.{kind}" for task in TASKS for kind in ("json", "jsonl")] + ["cache.json"]
EXAMPLES, OF_METRICS = 2500, 500
FUZZ = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
)


@pytest.fixture
def out(make_results):
    return make_results(*CACHES)


def failures(out, cache="lexico:15"):
    return collect(out)["caches"][cache]["failures"]


@pytest.mark.parametrize("lines", [0, 7, 19])
def test_the_first_lines_of_predictions_are_not_taken_for_all(out, lines):
    """What a full disk or a kill leaves."""
    path = out / "lexico-15" / "gsm8k.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:lines]))
    with pytest.raises(ValueError, match=r"gsm8k.jsonl is damaged: its checksum .*; run the same command again"):
        read_result(path.parent, "gsm8k")
    metrics = write_summary(out)
    assert set(metrics["caches"]["lexico:15"]["tasks"]) == {"wikitext", "needle"}
    assert "- lexico:15, gsm8k: `" in report(metrics) and "gsm8k.jsonl is damaged" in report(metrics)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(out, name):
    path = out / "lexico-15" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if name == "cache.json":  # results say it too
        assert failures(out) == {}
    else:
        assert list(failures(out)) == [name.partition(".")[0]]


def test_results_of_another_cache_or_task_are_refused(out):
    for kind in ("json", "jsonl"):
        shutil.copy(out / "bf16" / f"gsm8k.{kind}", out / "lexico-15" / f"gsm8k.{kind}")
        shutil.copy(out / "bf16" / f"wikitext.{kind}", out / "bf16" / f"needle.{kind}")
    assert "gsm8k.json belongs elsewhere: to gsm8k of bf16" in failures(out)["gsm8k"]
    assert "needle.json belongs elsewhere: to wikitext of bf16" in failures(out, "bf16")["needle"]


@pytest.mark.parametrize(
    "content", [b"", b"null", b'"text"', b"[" * 100_000 + b"]" * 100_000, b"9" * 5000, b'{"a": NaN}', b"\xff", b"{"]
)
def test_files_of_other_types_are_refused_in_one_sentence(out, content, capsys):
    write_summary(out)
    for name in ("gsm8k.json", "gsm8k.jsonl"):
        kept = (out / "lexico-15" / name).read_bytes()
        (out / "lexico-15" / name).write_bytes(content)
        assert "\n" not in failures(out)["gsm8k"]
        (out / "lexico-15" / name).write_bytes(kept)
    (out / "lexico-15" / "cache.json").write_bytes(content)
    assert failures(out) == {}
    (out / "metrics.json").write_bytes(content)
    assert cli.main(["eval", "--report", str(out)]) == 2
    words = capsys.readouterr().err
    assert words.count("\n") == 1 and "metrics.json is damaged" in words and "run the same command again" in words


def seal(values):
    """The checksum of an object as the file's format says it, and not as the product computes it."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return values | {"sha256": hashlib.sha256(text.encode()).hexdigest()}


@st.composite
def bytes_changed(draw, content):
    """A file that was cut, that has other bytes or bits somewhere, or a piece twice or not at all."""
    at = draw(st.integers(0, len(content) - 1))
    end = draw(st.integers(at, min(len(content), at + 40)))
    way = draw(st.sampled_from(["cut", "flip", "drop", "repeat", "put"]))
    if way == "cut":
        return content[:at]
    if way == "flip":
        return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
    if way == "drop":
        return content[:at] + content[end:]
    return content[:end] + (content[at:end] if way == "repeat" else draw(st.binary(max_size=8))) + content[end:]


ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([10**400, -(10**20), 1e308, 5e-324, -0.5, 501.0, {}, [], [[]], {"all": None}, "", "\n", "\x1b[2J"]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    st.just([[[[0]]]]),
)


@st.composite
def value_changed(draw, values):
    """An object of JSON with one field, however deep, that is another, missing, or new."""
    if not isinstance(values, dict | list) or not values or draw(st.integers(0, 4)) == 0:
        return draw(ODD)
    changed = values.copy()
    key = draw(st.sampled_from(sorted(values))) if isinstance(values, dict) else draw(st.integers(0, len(values) - 1))
    way = draw(st.integers(0, 9))
    if way == 0:
        del changed[key]
    elif way == 1 and isinstance(values, dict):
        changed["new"] = draw(ODD)
    else:
        changed[key] = draw(value_changed(values[key]))
    return changed


@st.composite
def mutations(draw, whole):
    """Names of files and what is in them now, of one kind of damage. whole: all contents, by name."""
    name = draw(st.sampled_from(sorted(whole)))
    way = draw(st.sampled_from(["bytes", "bytes", "sealed", "other file", "rows"]))
    task = name.partition(".")[0]
    if way == "other file":
        return {name: whole[draw(st.sampled_from(sorted(whole)))]}
    if way == "sealed" and name.endswith(".json"):
        values = json.loads(whole[name])
        del values["sha256"]
        changed = draw(value_changed(values))
        return {name: json.dumps(seal(changed) if isinstance(changed, dict) else changed).encode()}
    if way == "rows" and task in TASKS:
        rows = draw(value_changed([json.loads(line) for line in whole[f"{task}.jsonl"].splitlines()]))
        content = "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else json.dumps(rows)
        about = json.loads(whole[f"{task}.json"]) | {"rows_sha256": hashlib.sha256(content.encode()).hexdigest()}
        about["rows"] = len(rows) if isinstance(rows, list) else 1
        del about["sha256"]
        return {f"{task}.jsonl": content.encode(), f"{task}.json": json.dumps(seal(about)).encode()}
    return {name: draw(bytes_changed(whole[name]))}


def numbers(value):
    """All numbers in a value of JSON."""
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def test_mutations_are_loaded_right_or_refused_in_one_sentence(out, monkeypatch):
    """What loads has the content that its checksum is of, and its figures are finite numbers."""
    monkeypatch.setattr(statistics, "RESAMPLES", 8)
    folder = out / "lexico-15"
    whole = {name: (folder / name).read_bytes() for name in FILES}
    before = {task: read_result(folder, task) for task in TASKS}
    seen, present = {"loaded": 0, "refused": 0}, {}  # present: files that are not whole now

    @FUZZ
    @given(mutations(whole))
    def mutate(changed):
        for name in present.keys() | changed.keys():
            (folder / name).write_bytes(changed.get(name, whole[name]))
        present.clear()
        present.update(changed)
        for task in {name.partition(".")[0] for name in changed} & set(TASKS):
            check_task(task, changed)
        if "cache.json" in changed:
            assert [folder.cache.name for folder in read_folders(out)] == ["bf16", "lexico:15"]

    def check_task(task, changed):
        try:
            result = read_result(folder, task)
        except ValueError as error:
            assert "\n" not in str(error) and str(folder) in str(error), error
            seen["refused"] += 1
            return
        seen["loaded"] += 1
        about = json.loads((folder / f"{task}.json").read_bytes())
        assert list(result.rows) == [json.loads(line) for line in (folder / f"{task}.jsonl").read_bytes().splitlines()]
        assert about == seal({name: value for name, value in about.items() if name != "sha256"})
        if len(changed) == 1 and not changed.keys() & {f"{task}.json"}:
            assert result.rows == before[task].rows
        figures = task_metrics(task, result, before[task])
        assert all(math.isfinite(number) and number >= 0 for number in numbers(figures["measures"]))

    mutate()
    assert seen["loaded"] > EXAMPLES / 100 and seen["refused"] > EXAMPLES / 3, seen


def test_mutations_of_the_metrics_are_reported_or_refused_in_one_sentence(out):
    write_summary(out)
    path = out / "metrics.json"
    whole = {"metrics.json": path.read_bytes()}

    @settings(FUZZ, max_examples=OF_METRICS)
    @given(mutations(whole))
    def mutate(changed):
        path.write_bytes(changed["metrics.json"])
        try:
            report(read_metrics(out)).encode()
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error), error

    mutate()
