"""Training text from files and Hugging Face datasets: mixing, what is held out, and what is said of what is no text."""

import json
import lzma
import random
import sys
from types import ModuleType

import pytest

from vllm_lexico import cli
from vllm_lexico.train.run import TrainSettings
from vllm_lexico.train.texts import TextSequences, check_source, read_dataset, read_documents


class Rows:
    """Stands for a streamed dataset."""

    def __init__(self, rows):
        self.rows, self.seeds = rows, []

    def shuffle(self, seed, buffer_size):
        self.seeds.append(seed)
        return random.Random(seed).sample(self.rows, len(self.rows))


@pytest.fixture
def dataset(monkeypatch):
    """A package datasets that has one dataset, org/name, and notes what was asked of it."""
    stand_in = Rows([{"text": "a" * 50}, {"text": " "}, {"text": "b" * 50}])
    asked = stand_in.asked = []

    def load_dataset(path, config, *, split, streaming):
        asked.append((path, config, split))
        assert streaming
        if path != "org/name":
            raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub")
        return stand_in

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return stand_in


class Tokenizer:
    """A token a letter, which is its code point."""

    eos_token_id = 1

    def __call__(self, text, truncation, verbose):
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("org/name", ("org/name", None, "train")),
        ("org/name:english", ("org/name", "english", "train")),
        ("org/name:english:test", ("org/name", "english", "test")),
    ],
)
def test_names(dataset, name, asked):
    check_source(name)
    next(read_dataset(name, seed=0))
    assert dataset.asked == [asked]


def test_a_dataset_is_mixed_with_files_and_read_again_from_its_start(dataset, tmp_path):
    (tmp_path / "z.txt").write_text("z" * 1000)
    texts = TextSequences(["org/name", str(tmp_path / "z.txt")], Tokenizer(), length=120, seed=3)
    sequences = texts.take(4, 0)
    assert sequences.shape == (4, 120)
    rows = [set(map(chr, row)) - {"\x01"} for row in sequences.tolist()]
    assert rows == [{"a", "b"}, {"z"}, {"a", "b"}, {"z"}]
    first = dataset.seeds[0]
    assert dataset.seeds == list(range(first, first + len(dataset.seeds))) and len(dataset.seeds) > 1
    assert sequences.equal(texts.take(4, 0)) and not sequences.equal(texts.take(4, 1))


def read_by(texts: TextSequences, number: int | None, count: int = 100) -> set[int]:
    return set(texts.take(count, number).flatten().tolist()) - {Tokenizer.eos_token_id}


def test_held_out_documents_are_in_no_round(tmp_path):
    letters = [chr(0x4E00 + at) for at in range(50)]  # each document has its own
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": letter * 40}) + "\n" for letter in letters))
    texts = TextSequences([str(tmp_path / "a.jsonl")], Tokenizer(), length=100, seed=0)
    held_out = read_by(texts, None)
    assert len(held_out) == 3
    trained = [read_by(texts, number) for number in range(3)]
    assert all(row == set(map(ord, letters)) - held_out for row in trained)


def test_held_out_parts_of_one_book(tmp_path):
    (tmp_path / "a.txt").write_text("".join(chr(0x4E00 + at) * 50_000 for at in range(25)))
    texts = TextSequences([str(tmp_path / "a.txt")], Tokenizer(), length=100, seed=0)
    assert len(read_by(texts, None)) == 2 and not read_by(texts, None) & read_by(texts, 0)


def test_held_out_texts_of_a_dataset_are_in_no_round(dataset):
    dataset.rows = [{"text": chr(0x4E00 + at) * 40} for at in range(100)]
    texts = TextSequences(["org/name"], Tokenizer(), length=100, seed=0)
    held_out = read_by(texts, None)
    assert 0 < len(held_out) < 20
    assert all(read_by(texts, number, 300) == {0x4E00 + at for at in range(100)} - held_out for number in range(2))


def test_too_few_texts_to_hold_one_out(dataset, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": letter * 40}) + "\n" for letter in "xyz"))
    for source, letters in (("org/name", "ab"), (str(tmp_path / "a.jsonl"), "xyz")):
        texts = TextSequences([source], Tokenizer(), length=100, seed=0)
        assert read_by(texts, None) == read_by(texts, 0) == set(map(ord, letters))


def test_documents(tmp_path):
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in ("one", "two", " "))
    (tmp_path / "b.txt").write_text("three")
    assert read_documents(tmp_path / "a.jsonl.xz") == ["one", "two"]
    assert read_documents(tmp_path) == ["one", "two", "three"]


def test_bad_files(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": 1}\n')
    (tmp_path / "a.pdf").touch()
    (tmp_path / "empty.txt").touch()
    with pytest.raises(
        ValueError,
        match='line 1, has no "text" that is a string; allowed: one JSON object with a "text" field per line',
    ):
        read_documents(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"not text; allowed: files that end in \.txt"):
        read_documents(tmp_path / "a.pdf")
    with pytest.raises(ValueError, match=r"empty\.txt has no text"):
        read_documents(tmp_path / "empty.txt")


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        (
            "org/other",
            [],
            "org/other cannot be read as a Hugging Face dataset .*doesn't exist on the Hub.*check the name",
        ),
        ("org/name", [{"body": "a", "id": 1}], "a row has the fields body, id, and none of them is a text named text"),
        ("org/name", [{"text": ""}], "there is no text in it"),
        ("org/name", [], "there is no text in it"),
    ],
)
def test_what_cannot_be_read(dataset, name, rows, words):
    dataset.rows = rows
    with pytest.raises(ValueError, match=words):
        next(read_dataset(name, seed=0))


@pytest.mark.parametrize("name", ["absent", "a/b/c", "org/name:x:y:z", "/absent/folder", "code/absent.jsonl", "org/"])
def test_what_is_neither_path_nor_dataset(dataset, name):
    with pytest.raises(
        ValueError, match=r"--data is .*; allowed: files and folders that exist, or a Hugging Face dataset"
    ):
        TrainSettings(data=(name,))


def test_a_path_that_exists_needs_no_datasets(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    check_source(str(tmp_path))
    assert cli.main(["train", "some/model", "--data", "org/name"]) == 2
    error = capsys.readouterr().err
    assert "the package datasets is needed" in error and "pip install datasets" in error


def test_the_real_library_streams_a_folder(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", "two", "")))
    texts = read_dataset(str(tmp_path), seed=0)
    assert {next(texts), next(texts)} == {next(texts), next(texts)} == {"one", "two"}
    with pytest.raises(ValueError, match="cannot be read as a Hugging Face dataset"):
        next(read_dataset(f"{tmp_path}:default:absent", seed=0))


def test_a_text_longer_than_the_models_context_is_no_cause_for_a_warning(tiny_model, tmp_path, monkeypatch):
    """transformers' speaks of indexing errors, and nothing reads a text in one piece."""
    from transformers import AutoTokenizer
    from transformers.tokenization_utils_base import logger

    tokenizer, said = AutoTokenizer.from_pretrained(tiny_model, model_max_length=64), []
    monkeypatch.setattr(logger, "warning", lambda words, *_, **__: said.append(words))
    (tmp_path / "a.txt").write_text("abc" * 300)
    texts = TextSequences([str(tmp_path / "a.txt")], tokenizer, 512, 0)
    texts.identity()
    assert texts.take(1, 0).shape == (1, 512) and not said
    tokenizer("abc" * 300)
    assert "Token indices sequence length is longer" in said[0]  # what is not to be said
