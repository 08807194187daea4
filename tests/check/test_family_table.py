"""The README's table of models: what the command writes, by facts that hold."""

import json
import runpy

import pytest
from configurations import FAMILIES
from tried import MODELS

from vllm_lexico.check.model import read_shape


@pytest.fixture(scope="module")
def family_table(load_benchmark, root):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root / "benchmarks")
        yield load_benchmark("family_table")


def rows_of(root, results):
    lines = (root / "benchmarks" / "results" / f"{results}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_the_readme_has_the_table_that_is_written(family_table, root):
    page = (root / "README.md").read_text(encoding="utf-8")
    assert family_table.replaced(page, family_table.make_table()) == page, "run python benchmarks/family_table.py"


def test_every_configuration_has_a_line():
    assert set(MODELS) == set(FAMILIES)


def test_what_ran_on_a_cpu_is_a_family_of_the_engine_tests(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "tests" / "engine")
    files = ("tiny_families.py", "image_families.py")
    engines = {name for file in files for name in runpy.run_path(str(root / "tests" / "engine" / file))["FAMILIES"]}
    assert {known.engine for known in MODELS.values() if known.engine} <= engines


def test_shapes_that_ran_on_a_gpu_have_rows(root):
    rows = rows_of(root, "engine") + rows_of(root, "families")
    measured = {(row["case"].get("model", "").replace("-", " "), row["gpu"].split()[1]) for row in rows}
    measured |= {
        (row["case"].get("model", "").replace("-", " "), f"two {row['gpu'].split()[1]}s")
        for row in rows_of(root, "parallel")
        if row["case"].get("tensor_parallel") == 2
    }
    claimed = [
        (name.replace("-", " "), gpu)
        for name, known in MODELS.items()
        for gpu in (known.gpu or "").split(", ")
        if gpu and "tiny" not in gpu
    ]
    assert len(claimed) >= 5
    for name, gpu in claimed:
        assert any(model.startswith(name) and on == gpu for model, on in measured), (name, gpu)


def test_what_is_held_is_what_was_measured(family_table, root, write_family):
    """By requests of Llama-3.1-8B's shape that were decoding (`benchmarks/held.py`), but for two pages per layer."""
    shape = read_shape("Llama-3.1-8B", write_family("Llama-3.1-8B"))
    rows = [row for row in rows_of(root, "engine") if row["metric"] == "held_bytes_a_layer"]
    measured = {row["case"]["tokens"]: row for row in rows if row["case"]["sparsity"] == 15}
    assert len(measured) == 4
    for tokens, row in measured.items():
        coded, plain = (found / 32 for found in family_table.request_bytes(shape, tokens, family_table.HELD))
        assert plain == row["peer_value"] and row["value"] <= coded <= row["value"] + 2 * 65536


def test_windows_and_a_shorter_context_are_named(family_table, write_family):
    """Gemma 3 27B at 128k: 10 layers of codes and 52 windows of 1,024, a sixth of bf16's."""
    gemma = read_shape("Gemma-3-27B", write_family("Gemma-3-27B"))
    raw = 16 * 2 * 128 * 2
    coded, plain = family_table.request_bytes(gemma, 131072, family_table.HELD)
    windows = 52 * 1024 * raw
    assert plain == pytest.approx(10 * 131072 * raw + windows, rel=0.02)
    assert coded == pytest.approx(10 * 131072 * raw / 8 + windows, rel=0.06)
    falcon = read_shape("Falcon-7B", write_family("Falcon-7B"))
    assert family_table.lengths_of(falcon) == [2048]
    assert family_table.in_words(falcon, 2048, 32768).endswith(") at 2k")


def test_a_claim_that_the_check_denies_is_refused(family_table, tmp_path):
    known = MODELS["BLOOM-7B"]
    with pytest.raises(ValueError, match=r"BLOOM-7B was given as refused for None, the check says .*ALiBi"):
        family_table.row("BLOOM-7B", tmp_path, FAMILIES["BLOOM-7B"], known._replace(refused=None))
    with pytest.raises(ValueError, match="Qwen3-8B was given as refused for 'MLA'"):
        family_table.row("Qwen3-8B", tmp_path, FAMILIES["Qwen3-8B"], known._replace(refused="MLA"))


@pytest.mark.parametrize("page", ["", "{start}", "{end}{start}", "{start}{start}{end}", "{start}{end}{end}"])
def test_a_page_without_its_marks_is_refused(family_table, page):
    page = page.format(start=family_table.START, end=family_table.END)
    with pytest.raises(ValueError, match="put them around the table"):
        family_table.replaced(page, "|")
