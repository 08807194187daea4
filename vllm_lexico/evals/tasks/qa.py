"""Questions about one of many passages of XQuAD (English; Artetxe et al., 2019), a part of SQuAD's development set.

The passages are computed first and the question comes after them (`asking`). An answer counts when it has the words of
the right answer one after the other, as SQuAD's own script normalizes both: models that talk answer in sentences, which
an exact match would count as wrong for every cache alike, so that it shows less of what a cache loses. Exact match and
F1 of the answer's first line are measured too.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field

from vllm_lexico.errors import refusal
from vllm_lexico.evals.fields import Count, Fields, Flag, Printable
from vllm_lexico.evals.measure import Measure
from vllm_lexico.evals.settings import EvalSettings, QaSettings
from vllm_lexico.evals.tasks.asking import Document, Frame, Question, ask, row_of, shares, that_fit
from vllm_lexico.evals.tasks.windows import list_of_texts, read_rows, texts_of

if TYPE_CHECKING:
    from vllm_lexico.evals.engine import Engine

DATA_FILES: tuple[str, ...] = ("xquad_en.jsonl.xz",)
NEEDS_HARNESS = False
LEAVES_SIZES_OUT = True
ANSWER_TOKENS = 40
PASSAGE_TOKENS = 200  # more than a passage has on average: 150 to 180, by the tokenizer
MARGIN_TOKENS = 2500  # some passages are long

OPENING = "Read the passages below. A question about one of them follows at their end.\n\n"
QUESTION = "\nQuestion: {question}\nAnswer with the words of the passage that answer it, and nothing else."
ENDING = "\nAnswer:"


class Row(Fields):
    """The fields of a prediction that `measures` reads. passages: in the context; passage: which of all is asked of."""

    id: Printable
    passages: Count
    passage: Count
    found: Flag
    exact: Flag
    f1: Annotated[float, Field(ge=0, le=1)]


ROWS = list[Row]


class Passage(NamedTuple):
    """A text, and questions about it with an answer each."""

    text: str
    questions: list[tuple[str, str]]


def read_passages(path: Path) -> list[Passage]:
    """Rows of "context" and "qas", each of "question" and "answers"; ValueError where the file is something else."""

    def passage(row: Any) -> Passage:
        (text,) = texts_of(row, "context")
        answers = [list_of_texts(qa["answers"]) for qa in row["qas"]]
        if not answers or not all(answers):
            raise ValueError("a passage has no question, or a question no answer")
        questions = [(texts_of(qa, "question")[0], first) for qa, (first, *_) in zip(row["qas"], answers, strict=True)]
        return Passage(text, questions)

    return read_rows(path, passage)


def needed_tokens(settings: EvalSettings) -> int:
    """Tokens that the longest sequence hardly exceeds; what does is left out by its tokens (`that_fit`)."""
    return max(settings.qa.passages) * PASSAGE_TOKENS + MARGIN_TOKENS


class Builder:
    """Builds contexts for one tokenizer; the same every time for the same settings.

    Raises:
        ValueError: there are fewer passages or questions than the settings ask for.
    """

    def __init__(self, passages: Sequence[Passage], tokenizer: Any, settings: QaSettings) -> None:
        self.passages, self.settings = passages, settings
        self.frame = Frame(tokenizer, OPENING, ENDING)
        self._ids = [self.frame.encode(passage.text.strip() + "\n\n") for passage in passages]
        generator = random.Random(f"{settings.seed} questions")
        order = generator.sample(range(len(passages)), len(passages))
        numbers = [generator.sample(range(len(each.questions)), len(each.questions)) for each in passages]
        # Passages before second questions: those of one passage are of one cluster, and tell less.
        rounds = range(max(map(len, numbers)))
        self.asked = [(at, numbers[at][i]) for i in rounds for at in order if i < len(numbers[at])]
        if settings.samples > len(self.asked):
            allowed = f"1 to {len(self.asked)}, as many as the data has"
            raise ValueError(refusal("--qa-samples", settings.samples, allowed, "lower it"))
        if max(settings.passages) > len(passages):
            allowed = f"1 to {len(passages)}, as many as the data has"
            raise ValueError(refusal("--qa-passages", max(settings.passages), allowed, "lower it"))

    def document(self, count: int, index: int) -> Document:
        """Passages in a random order, and a question about one of them.

        Args:
            count: passages.
            index: of the question.
        """
        at, number = self.asked[index]
        generator = random.Random(f"{self.settings.seed} {count} {index}")
        chosen = generator.sample([other for other in range(len(self.passages)) if other != at], count - 1)
        place = generator.randrange(count)
        chosen.insert(place, at)
        opening, before = self.frame.opening(), sum(len(self._ids[each]) for each in chosen[:place])
        text = [token for each in chosen for token in self._ids[each]]
        words, answer = self.passages[at].questions[number]
        about = {
            "id": f"{count}/{at}/{number}",
            "passages": count,
            "passage": at,
            "depth": round(before / len(text), 4),
            "question": words,
            "value": answer,
        }
        return Document(opening + text, [Question(self.frame.question(QUESTION.format(question=words)), about)])


def score(value: str, answer: str) -> dict[str, Any]:
    """Whether an answer has the right one's words, whether its first line is the right one, and that line's F1.

    Normalized as SQuAD's script does, by transformers: lower case, without articles and punctuation.
    """
    from transformers.data.metrics.squad_metrics import compute_exact, compute_f1, get_tokens

    line = next((line for line in answer.splitlines() if line.strip()), "")
    words, wanted = get_tokens(answer), get_tokens(value)
    found = any(words[i : i + len(wanted)] == wanted for i in range(len(words))) if wanted else not words
    return {"found": int(found), "exact": int(compute_exact(value, line)), "f1": float(compute_f1(value, line))}


def run(engine: Engine, settings: EvalSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one question each, and what the sequences held, all and by the number of passages."""
    task = settings.qa
    builder = Builder(read_passages(Path(settings.data) / DATA_FILES[0]), engine.tokenizer, task)
    documents = {count: [builder.document(count, i) for i in range(task.samples)] for count in task.passages}
    documents_that_fit = that_fit(engine, "qa", documents, ANSWER_TOKENS)
    engine.expect(2 * task.samples * len(documents_that_fit))
    rows: list[dict[str, Any]] = []
    held: dict[str, Any] = {}
    stop = () if builder.frame.is_chat else ("\n\n", "\nQuestion:")
    for count, of_count in documents_that_fit.items():
        answered, held[str(count)] = ask(engine, of_count, ANSWER_TOKENS, stop)
        for _, question, output in answered:
            row = row_of(question, output)
            rows.append(row | score(row["value"], row["answer"]))
    return rows, {"all": [one for of_count in held.values() for one in of_count]} | held


def measures(rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None = None) -> list[Measure]:
    """Share of answers found, of all and by passages; exact match and F1. Questions of one passage are one cluster."""
    clusters = {row["id"]: row["passage"] for row in rows}
    return [
        *shares("qa", rows, "found", "passages", "passage"),
        Measure("qa_exact", "share", {row["id"]: row["exact"] for row in rows}, clusters),
        Measure("qa_f1", "mean", {row["id"]: row["f1"] for row in rows}, clusters),
    ]
