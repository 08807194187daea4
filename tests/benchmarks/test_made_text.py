"""How the text of the package is made: what it takes and what it leaves."""

import json
import lzma
import random

import pytest

from vllm_lexico.train.texts import TextSequences, read_documents

WORDS = ("river", "engine", "letter", "winter", "museum", "garden", "ladder", "market", "pocket", "signal")


class Letters:
    """A tokenizer of single bytes."""

    eos_token_id = None

    def __call__(self, text: str, truncation: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def prose(seed: int, paragraphs: int) -> str:
    draw = random.Random(seed)
    return "\n\n".join(" ".join(draw.choices(WORDS, k=40)) for _ in range(paragraphs))


@pytest.fixture
def source(tmp_path):
    """A file of forty texts, of which the first and the 21st are held out, the second repeats the first."""
    texts = [prose(0, 12), prose(0, 12), *(prose(seed, 40) for seed in range(2, 40))]
    rows = [{"text": text, "source": "some/books", "license": "CC0-1.0"} for text in texts]
    rows[3]["license"], rows[4]["source"] = "CC BY-SA 4.0", "others/books"
    path = tmp_path / "train_books.jsonl.xz"
    path.write_bytes(lzma.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path, rows


def test_parts_are_held_out_as_in_training(import_benchmark, source):
    held_out, (path, rows) = import_benchmark("bench.held_out"), source
    found = held_out.rows_of(path)
    assert [at for at, row in enumerate(found) if row["held_out"]] == [0, 20]
    assert [row["held_out"] + row["read"] for row in found] == [[text] for text in read_documents(path)]
    assert held_out.held_out_texts(path, without="others/books") == [rows[0]["text"], rows[20]["text"]]
    assert held_out.held_out_texts(path, without="some/books") == []
    taken = TextSequences([str(path)], Letters(), 256, 0).take(6, None)
    kept = "".join(row["text"] for row in found if row["held_out"])
    assert all(bytes(ids.tolist()).decode() in kept for ids in taken)


def test_pieces_are_of_free_texts_that_nothing_holds_out(import_benchmark, source, tmp_path):
    package_text, (_, rows) = import_benchmark("package_text"), source
    portion = package_text.Portion("books", "books", "some", 34 * 2_000)
    pieces = list(package_text.chosen(portion, tmp_path))
    assert pieces == list(package_text.chosen(portion, tmp_path))
    left_out = [rows[at]["text"] for at in (0, 1, 3, 4, 20)]
    assert not any(piece["text"] in text for piece in pieces for text in left_out)
    assert all(package_text.SHORTEST <= len(piece["text"]) <= package_text.LONGEST for piece in pieces)
    origins = [next(at for at, row in enumerate(rows) if piece["text"] in row["text"]) for piece in pieces]
    assert len(set(origins)) == len(origins) > 15
    with pytest.raises(SystemExit, match="lower its portion"):
        list(package_text.chosen(package_text.Portion("books", "books", "some", 10**6), tmp_path))


def test_talk_is_the_piece_with_most_of_it(import_benchmark):
    package_text = import_benchmark("package_text")
    talk = "\n\n".join(f"“{' '.join(WORDS)}, {number}?”" for number in range(40))
    text = f"{prose(1, 30)}\n\n{talk}\n\n{prose(2, 30)}"
    assert package_text.spoken(text).count("“") > 25


def test_declarations_are_cut_at_paragraphs(import_benchmark, tmp_path):
    package_text = import_benchmark("package_text")
    lines = [f"<p>{number} &amp; {' '.join(WORDS)} {'word ' * 30}</p>" for number in range(60)]
    for language in package_text.LANGUAGES:
        (tmp_path / f"{language}.html").write_text("<html><body>" + "\n".join(lines) + "</body></html>")
    pieces = [row["text"] for row in package_text.declarations(tmp_path) if row["source"].endswith(":fra")]
    assert len(pieces) > 2 and "<" not in "".join(pieces)
    assert [line.split()[0] for line in "\n".join(pieces).split("\n")] == [str(number) for number in range(60)]
