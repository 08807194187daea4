"""Training text from Hugging Face datasets: names, the stream, and what is said when it cannot be read."""

import json
import random
import sys
from types import ModuleType

import pytest

from vllm_lexico import cli
from vllm_lexico.train.run import TrainSettings
from vllm_lexico.train.texts import check_source, read_dataset, sequences_from_files


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
    """A token a letter."""

    eos_token_id = 1

    def __call__(self, text, truncation):
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
    sources = ["org/name", tmp_path / "z.txt"]
    sequences = sequences_from_files(sources, Tokenizer(), length=120, count=4, seed=3)
    rows = [set(map(chr, row)) - {"\x01"} for row in sequences.tolist()]
    assert rows == [{"a", "b"}, {"z"}, {"a", "b"}, {"z"}]
    assert dataset.seeds == [3, 4, 5, 6][: len(dataset.seeds)] and len(dataset.seeds) > 1
    assert sequences.equal(sequences_from_files(sources, Tokenizer(), length=120, count=4, seed=3))


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
