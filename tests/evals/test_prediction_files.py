"""Results on disk: whole or refused. Files that were cut, changed or belong elsewhere, and 3,000 mutations of them."""

import hashlib
import json
import math
import shutil
from functools import partial

import pytest
from hypothesis import HealthCheck, Phase, given, settings
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
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
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


def bytes_changed(content):
    """The bytes of a file that was cut, or has a bit flipped, a piece twice or not at all, or a byte more."""

    def change(at, size, way, byte):
        end = at + size
        return {
            "cut": content[:at],
            "flip": content[:at] + bytes([content[at] ^ 1 << byte % 8]) + content[at + 1 :],
            "drop": content[:at] + content[end:],
            "repeat": content[:end] + content[at:end] + content[end:],
            "put": content[:at] + bytes([byte]) + content[at:],
        }[way]

    ways = st.sampled_from(["cut", "flip", "drop", "repeat", "put"])
    return st.builds(change, st.integers(0, len(content) - 1), st.integers(1, 40), ways, st.integers(0, 255))


ODD = st.one_of(
    st.sampled_from(
        [None, True, 0, 1, -1, 10**400, -(10**20), 1e308, 5e-324, -0.5, 501.0, {}, [], [[[0]]], {"all": None}]
    ),
    st.sampled_from(["", "\n", "\x1b[2J", "bf16", "gsm8k", "single"]),
    st.integers(-3, 3),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)


def paths(values, at=()):
    """Keys that lead to each part of a value of JSON."""
    yield at
    for key in values if isinstance(values, dict) else range(len(values)) if isinstance(values, list) else ():
        yield from paths(values[key], (*at, key))


def put(values, path, way, odd):
    """The value with `odd` in one place of it, or beside it, or nothing there."""
    if not path:
        return odd
    changed, key = values.copy(), path[0]
    if len(path) == 1 and way == "delete":
        del changed[key]
    elif len(path) == 1 and way == "add" and isinstance(values, dict):
        changed["new"] = odd
    else:
        changed[key] = put(values[key], path[1:], way, odd)
    return changed


def value_changed(values):
    """A value of JSON with one part of it, however deep, another, missing or new."""
    ways = st.sampled_from(["put", "put", "put", "delete", "add"])
    return st.builds(put, st.just(values), st.sampled_from(list(paths(values))), ways, ODD)


def mutations(whole):
    """Names of files and what is in them now, of one kind of damage. whole: all contents, by name."""

    def sealed_file(name, values):
        return {name: json.dumps(seal(values) if isinstance(values, dict) else values).encode()}

    def sealed_rows(task, rows):
        content = "".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else json.dumps(rows)
        about = objects[f"{task}.json"] | {"rows_sha256": hashlib.sha256(content.encode()).hexdigest()}
        about["rows"] = len(rows) if isinstance(rows, list) else 1
        return {f"{task}.jsonl": content.encode(), **sealed_file(f"{task}.json", about)}

    objects = {name: json.loads(content) for name, content in whole.items() if name.endswith(".json")}
    for values in objects.values():
        del values["sha256"]
    names = st.sampled_from(sorted(whole))
    changed = [st.builds(lambda name, other: {name: whole[other]}, names, names)]
    for name, content in whole.items():
        changed += [bytes_changed(content).map(lambda damaged, name=name: {name: damaged})] * 2
        if name in objects:
            changed.append(value_changed(objects[name]).map(partial(sealed_file, name)))
        else:
            rows = [json.loads(line) for line in content.splitlines()]
            changed.append(value_changed(rows).map(partial(sealed_rows, name.partition(".")[0])))
    return st.one_of(changed)


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
