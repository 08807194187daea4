"""Real text of the package beside what a model writes: where it comes from, and that a run reads it."""

import json
import lzma

import pytest
import torch
from small_runs import settings_for

from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.search import bundled_folder
from vllm_lexico.train import package_text, rounds, run
from vllm_lexico.train.package_text import mixed, package_documents, package_text_identity
from vllm_lexico.train.run import train_dictionary
from vllm_lexico.train.settings import Plan, own_tokens

FREE = {"public domain", "CC BY 4.0"}


def test_every_row_names_its_source_and_a_free_licence():
    content = lzma.decompress((bundled_folder() / package_text.FILE).read_bytes()).decode()
    rows = [json.loads(line) for line in content.splitlines()]
    assert {row["kind"] for row in rows} == {"books", "textbooks", "docs", "math"}
    assert {row["license"] for row in rows} <= FREE and all(row["source"] and len(row["text"]) > 1000 for row in rows)


def test_code_is_pythons_own():
    documents = package_documents()
    assert set(documents) == {"books", "textbooks", "docs", "math", "code"}
    assert sum("import " in text for text in documents["code"]) > 50
    assert 300_000 < sum(map(len, documents["code"])) < 10_000_000


def test_nothing_installed_is_nothing_read(monkeypatch, tmp_path):
    package_documents.cache_clear()
    monkeypatch.setattr(package_text, "bundled_folder", lambda: tmp_path)
    assert package_documents() == {}
    package_documents.cache_clear()


def test_rows_are_mixed_the_same_way_for_a_seed():
    own, other = torch.zeros(6, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64)
    rows = mixed(own, other, 1)
    assert rows.sum() == 12 and torch.equal(rows, mixed(own, other, 1)) and not torch.equal(rows, mixed(own, other, 3))


def test_the_model_writes_the_rest():
    given = settings_for(package_text=0.4)
    assert [given.own_sequences(count) for count in (1, 2, 5, 10)] == [1, 2, 3, 6]
    assert own_tokens(given, Plan(3, 5, 2, 64)) == (3 * 3 + 2) * 64


@pytest.fixture
def small_package(monkeypatch):
    """A package's text of one letter, which this model never writes so often."""
    documents = {"books": ["z" * 3000] * 20}
    for module in (run, package_text):
        monkeypatch.setattr(module, "package_documents", lambda: documents)
    return documents


def test_a_run_reads_both_and_says_so(tiny_model, tmp_path, monkeypatch, small_package):
    read, capture = [], rounds.capture

    def noted(loaded, sequences, *arguments, **more):
        read.append(sequences)
        return capture(loaded, sequences, *arguments, **more)

    monkeypatch.setattr(rounds, "capture", noted)
    settings = settings_for(package_text=0.5, rounds=2, passes=1)
    path = train_dictionary(str(tiny_model), settings, name="me/tiny", out=tmp_path / "d.safetensors", device="cpu")
    foreign = [(rows == 27).float().mean(1) > 0.9 for rows in read]  # 27: z
    assert [int(own.sum()) for own in foreign] == [len(rows) // 2 for rows in read] and len(read) == 3
    info = load_dictionary(path).info
    assert info.recipe["own_text"]["package_text"] == 0.5 and info.data.endswith("and text of the package")


def test_its_text_is_part_of_a_run(small_package):
    before = package_text_identity()
    small_package["books"][0] = "other"
    assert package_text_identity() != before


def test_data_of_the_user_leaves_it_out(tiny_model, tmp_path, texts):
    settings = settings_for(texts, package_text=0.5, rounds=1)
    path = train_dictionary(str(tiny_model), settings, name="me/tiny", out=tmp_path / "d.safetensors", device="cpu")
    info = load_dictionary(path).info
    assert "package" not in info.data and "own_text" not in info.recipe
