"""Retrieval from long texts: a key's value, hidden once or among others of its kind in pages of textbooks.

Answers read the text out of the KV cache (`asking`). Keys and values are random words, so that nothing but the text can
tell them.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vllm_lexico.evals.fields import Count, Fields, Flag, Printable
from vllm_lexico.evals.measure import Measure
from vllm_lexico.evals.settings import EvalSettings, NeedleSettings
from vllm_lexico.evals.tasks.asking import Frame, ask, sizes_that_fit
from vllm_lexico.train.texts import read_documents

if TYPE_CHECKING:
    from vllm_lexico.evals.engine import Engine

DATA_FILES: tuple[str, ...] = ("train_textbooks.jsonl.xz",)
NEEDS_HARNESS = False
LEAVES_SIZES_OUT = True
ANSWER_TOKENS = 24
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
KINDS = ("single", "multi")
VOCABULARY = 4000  # words that keys and values are drawn from

OPENING = "Read the text below. A question about it follows at its end.\n\n"
NEEDLE = 'Note: the password of "{key}" is "{value}".'
QUESTION = (
    '\n\nThe text above says in a note what the password of "{key}" is. Which is it? Answer with the password alone.'
)
ENDING = "\nAnswer: The password is"


class Row(Fields):
    """The fields of a prediction that `measures` reads. length: tokens that the document was made for."""

    id: Printable
    document: Printable
    length: Count
    kind: Literal["single", "multi"]  # KINDS
    found: Flag


ROWS = list[Row]


def needed_tokens(settings: EvalSettings) -> int:
    """Tokens of the longest sequence that the task will make."""
    return max(settings.needle.lengths, default=0)


@dataclass(frozen=True)
class Question:
    """What is asked of a document. depth: where in it the answer is, 0 to 1. prompt: what follows the document."""

    key: str
    value: str
    depth: float
    prompt: list[int]


@dataclass(frozen=True)
class Document:
    """A text with needles in it. prompt: token ids up to its end, with what comes before it."""

    name: str
    length: int
    kind: str
    prompt: list[int]
    questions: list[Question]


class Builder:
    """Builds documents for one tokenizer; the same every time for the same settings."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, settings: NeedleSettings) -> None:
        self.texts, self.tokenizer, self.settings = texts, tokenizer, settings
        self.words = vocabulary(texts)
        self.frame = Frame(tokenizer, OPENING, ENDING)
        self.encode = self.frame.encode

    def document(self, length: int, kind: str, index: int) -> Document:
        """A document whose longest question and answer together with it take `length` tokens.

        Args:
            length: tokens.
            kind: one of KINDS.
            index: which of its kind and length; decides the text, the needles and their depths.

        Raises:
            ValueError: the needles do not fit.
        """
        generator = random.Random(f"{self.settings.seed} {length} {kind} {index}")
        count = 1 if kind == "single" else self.settings.keys
        words = generator.sample(self.words, 4 * count)
        pairs = [(" ".join(words[4 * i : 4 * i + 2]), " ".join(words[4 * i + 2 : 4 * i + 4])) for i in range(count)]
        asked = [self.frame.question(QUESTION.format(key=key)) for key, _ in pairs]
        needles = [self.encode(NEEDLE.format(key=key, value=value) + "\n\n") for key, value in pairs]
        before = self.frame.opening()
        room = length - len(before) - max(map(len, asked)) - ANSWER_TOKENS - sum(map(len, needles))
        if room < 1:
            raise ValueError(
                f"a document of {length} tokens has no room for {count} needles; allowed: {length - room + 1} and "
                f"more; raise --needle-lengths or lower --needle-keys"
            )
        depths = [DEPTHS[index % len(DEPTHS)]] if kind == "single" else [(i + 0.5) / count for i in range(count)]
        ids, addresses = hide(self._paragraphs(generator, room), needles, depths)
        questions = [
            Question(key, value, place / max(len(ids), 1), prompt)
            for (key, value), place, prompt in zip(pairs, addresses, asked, strict=True)
        ]
        return Document(f"{length}/{kind}/{index}", length, kind, before + ids, questions)

    def _paragraphs(self, generator: random.Random, room: int) -> list[list[int]]:
        """Paragraphs of consecutive texts from a random place on, `room` tokens in all."""
        paragraphs: list[list[int]] = []
        at = generator.randrange(len(self.texts))
        while room:
            for paragraph in re.split(r"\n\s*\n", self.texts[at % len(self.texts)]):
                ids = self.encode(paragraph.strip() + "\n\n")[:room] if paragraph.strip() else []
                if ids:
                    paragraphs.append(ids)
                    room -= len(ids)
            at += 1
        return paragraphs


def hide(
    paragraphs: Sequence[list[int]], needles: Sequence[list[int]], depths: Sequence[float]
) -> tuple[list[int], list[int]]:
    """Put needles between paragraphs, each at the boundary nearest to its depth.

    Args:
        paragraphs, needles: token ids.
        depths: of the needles, ascending, as shares of the text.

    Returns:
        The joined token ids, and where in them each needle begins.
    """
    boundaries = [0]
    for paragraph in paragraphs:
        boundaries.append(boundaries[-1] + len(paragraph))
    total = boundaries[-1]
    chosen = [_nearest(boundaries, depth * total) for depth in depths]
    ids: list[int] = []
    addresses: list[int] = []
    for i in range(len(boundaries)):
        for needle, boundary in zip(needles, chosen, strict=True):
            if boundary == i:
                addresses.append(len(ids))
                ids += needle
        if i < len(paragraphs):
            ids += paragraphs[i]
    return ids, addresses


def _nearest(boundaries: Sequence[int], place: float) -> int:
    return min(range(len(boundaries)), key=lambda i: abs(boundaries[i] - place))


def vocabulary(texts: Sequence[str]) -> list[str]:
    """The most frequent lower-case words of 5 to 9 letters, in alphabetical order."""
    counts: dict[str, int] = {}
    for text in texts:
        for word in re.findall(r"\b[a-z]{5,9}\b", text):
            counts[word] = counts.get(word, 0) + 1
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:VOCABULARY]
    return sorted(frequent)


def is_found(value: str, answer: str) -> bool:
    """Whether the answer has the value's words, one after the other, whatever the case and what stands between them."""
    words = re.findall(r"[a-z]+", answer.lower())
    wanted = value.split()
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def run(engine: Engine, settings: EvalSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one question each, and what the sequences held, all and by length."""
    task = settings.needle
    builder = Builder(read_documents(Path(settings.data) / DATA_FILES[0]), engine.tokenizer, task)
    lengths = sizes_that_fit(engine, "needle", {length: length for length in task.lengths})
    engine.expect(len(lengths) * task.samples * (len(KINDS) + 1 + task.keys))
    rows: list[dict[str, Any]] = []
    held: dict[str, Any] = {}
    for length in lengths:
        documents = [builder.document(length, kind, i) for kind in KINDS for i in range(task.samples)]
        answered, held[str(length)] = ask(engine, documents, ANSWER_TOKENS)
        rows += [_row(document, question, output) for document, question, output in answered]
    return rows, {"all": [one for of_length in held.values() for one in of_length]} | held


def _row(document: Document, question: Question, output: Any) -> dict[str, Any]:
    answer = output.outputs[0].text
    return {
        "id": f"{document.name}/{question.key}",
        "document": document.name,
        "length": document.length,
        "kind": document.kind,
        "depth": round(question.depth, 4),
        "value": question.value,
        "answer": answer,
        "found": int(is_found(question.value, answer)),
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
    }


def measures(rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None = None) -> list[Measure]:
    """Share of values found: of all, by length, and by length and kind. Questions of one document are one cluster."""
    groups: list[tuple[dict[str, Any], list[Mapping[str, Any]]]] = [({}, list(rows))]
    for length in sorted({row["length"] for row in rows}):
        of_length = [row for row in rows if row["length"] == length]
        groups.append(({"length": length}, of_length))
        groups += [({"length": length, "kind": k}, [r for r in of_length if r["kind"] == k]) for k in KINDS]
    return [
        Measure(
            "_".join(["needle", *map(str, case.values())]),
            "share",
            {row["id"]: row["found"] for row in members},
            {} if case.get("kind") == "single" else {row["id"]: row["document"] for row in members},
            case,
        )
        for case, members in groups
        if members
    ]
