"""Texts with several questions each, for `uneven.py`: those of the evaluation's tasks, drawn by another seed."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_lexico.evals.settings import NeedleSettings
from vllm_lexico.evals.tasks import needle, pairs, qa
from vllm_lexico.evals.tasks.asking import Frame
from vllm_lexico.train.asked import REPEAT
from vllm_lexico.train.texts import read_documents

SEED = 77
LAST_TOKENS = 8  # of a chunk, by which the next is asked for
TRAINING_FILES = "train_*.jsonl.xz"


@dataclass(frozen=True)
class Text:
    """A text and what is asked of it.

    task, index: name it. ids: up to its end, with what comes before it. prompts: ids of each question, which follow it.
    values: right answers. found: whether an answer has a value. most: tokens of an answer.
    """

    task: str
    index: int
    ids: list[int]
    prompts: list[list[int]]
    values: list[str]
    found: Callable[[str, str], bool]
    most: int


class QaTexts:
    """Passages of XQuAD in a random order, and questions about some of them, each passage asked about once at most."""

    def __init__(self, tokenizer: Any, data: Path, passages: int, questions: int) -> None:
        self.count, self.questions = passages, min(questions, passages)
        self.passages = qa.read_passages(data / qa.DATA_FILES[0])
        self.frame = Frame(tokenizer, qa.OPENING, qa.ENDING)
        self._order = random.Random(f"{SEED} asked").sample(range(len(self.passages)), len(self.passages))

    def text(self, index: int) -> Text:
        """One of so many."""
        generator = random.Random(f"{SEED} {self.count} {index}")
        start = index * self.questions
        asked = [self._order[at % len(self._order)] for at in range(start, start + self.questions)]
        others = [at for at in range(len(self.passages)) if at not in asked]
        chosen = asked + generator.sample(others, self.count - len(asked))
        generator.shuffle(chosen)
        ids = self.frame.opening()
        for at in chosen:
            ids += self.frame.encode(self.passages[at].text.strip() + "\n\n")
        drawn = [generator.choice(self.passages[at].questions) for at in asked]
        prompts = [self.frame.question(qa.QUESTION.format(question=words)) for words, _ in drawn]

        def found(value: str, answer: str) -> bool:
            return bool(qa.score(value, answer)["found"])

        return Text(f"qa_{self.count}", index, ids, prompts, [answer for _, answer in drawn], found, qa.ANSWER_TOKENS)


class PairsTexts:
    """A JSON object of UUIDs, and the keys of some of them."""

    def __init__(self, tokenizer: Any, pairs_in_text: int, questions: int) -> None:
        self.count, self.questions = pairs_in_text, min(questions, pairs_in_text)
        self.frame = Frame(tokenizer, pairs.OPENING, pairs.ENDING)

    def text(self, index: int) -> Text:
        """One of so many."""
        generator = random.Random(f"{SEED} {self.count} {index}")
        drawn = [[str(uuid.UUID(int=generator.getrandbits(128), version=4)) for _ in "kv"] for _ in range(self.count)]
        ids = self.frame.opening()
        for i, (key, value) in enumerate(drawn):
            ids += self.frame.encode(pairs.PAIR.format(key=key, value=value) + ("}" if i == self.count - 1 else ",\n "))
        asked = generator.sample(drawn, self.questions)
        prompts = [self.frame.question(pairs.QUESTION.format(key=key)) for key, _ in asked]
        values = [value for _, value in asked]
        return Text(f"pairs_{self.count}", index, ids, prompts, values, pairs.is_found, pairs.ANSWER_TOKENS)


class NeedleTexts:
    """Pages of textbooks with several passwords, and the question for each."""

    def __init__(self, tokenizer: Any, data: Path, length: int, questions: int) -> None:
        self.length = length
        settings = NeedleSettings(keys=max(2, questions), seed=SEED)
        self.builder = needle.Builder(read_documents(data / needle.DATA_FILES[0]), tokenizer, settings)
        self.frame = self.builder.frame

    def text(self, index: int) -> Text:
        """One of so many."""
        document = self.builder.document(self.length, "multi", index)
        prompts = [question.prompt for question in document.questions]
        values = [question.value for question in document.questions]
        task = f"needle_{self.length}"
        return Text(task, index, document.prompt, prompts, values, needle.is_found, needle.ANSWER_TOKENS)


AnyTexts = QaTexts | PairsTexts | NeedleTexts


def make_texts(names: list[str], tokenizer: Any, data: Path, questions: int) -> list[AnyTexts]:
    """Of the named tasks, each `qa_PASSAGES`, `pairs_PAIRS` or `needle_TOKENS`; ValueError for another name."""
    made: list[AnyTexts] = []
    for name in names:
        task, _, size = name.partition("_")
        if task not in ("qa", "pairs", "needle") or not size.isdecimal() or int(size) < 1:
            raise ValueError(f"task {name!r}; allowed: qa_PASSAGES, pairs_PAIRS, needle_TOKENS, as in qa_20; change it")
        if task == "qa":
            made.append(QaTexts(tokenizer, data, int(size), questions))
        elif task == "pairs":
            made.append(PairsTexts(tokenizer, int(size), questions))
        else:
            made.append(NeedleTexts(tokenizer, data, int(size), questions))
    return made


def repetitions(frame: Frame, ids: list[int], chunk: int) -> Iterator[list[int]]:
    """What follows a text when a model is asked to repeat it and does, chunk by chunk (KVzip, arXiv 2505.23416)."""
    for start in range(0, len(ids), chunk):
        where = ""
        if start:
            last = frame.tokenizer.decode(ids[max(0, start - LAST_TOKENS) : start])
            where = f", from where it says `{last}` on"
        yield frame.question(REPEAT.format(where=where)) + ids[start : start + chunk]


def training_texts(frame: Frame, data: Path, tokens: int, count: int) -> list[list[int]]:
    """Ids of texts of training, of as many tokens each, from all files of training in turn.

    Raises:
        ValueError: there are no such files.
    """
    files = sorted(data.glob(TRAINING_FILES))
    if not files:
        raise ValueError(f"--data {data} has no {TRAINING_FILES}; allowed: a folder of training texts; name that one")
    documents = [read_documents(file) for file in files]
    made = []
    for i in range(count):
        own, ids = documents[i % len(files)], frame.opening()
        at = random.Random(f"{SEED} training {i}").randrange(len(own))
        while len(ids) < tokens:
            ids += frame.encode(own[at % len(own)].strip() + "\n\n")
            at += 1
        made.append(ids[:tokens])
    return made
