"""The value of one of many random keys, all UUIDs in a JSON object, after Liu et al., Lost in the Middle (2023).

The pairs are computed first and the key comes after them (`asking`). Nothing but the text can tell a value, and all of
its digits have to be right.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_lexico.evals.fields import Count, Fields, Flag, Printable
from vllm_lexico.evals.measure import Measure
from vllm_lexico.evals.settings import EvalSettings, PairsSettings
from vllm_lexico.evals.tasks.asking import Document, Frame, Question, ask, row_of, shares, that_fit

if TYPE_CHECKING:
    from vllm_lexico.evals.engine import Engine

DATA_FILES: tuple[str, ...] = ()
NEEDS_HARNESS = False
LEAVES_SIZES_OUT = True
ANSWER_TOKENS = 96  # a key and a value, for those who repeat the key
PAIR_TOKENS = 96  # more than a pair has: 50 to 90, by the tokenizer
MARGIN_TOKENS = 400

OPENING = "Below is a JSON object of keys and values. At its end you are asked for the value of one key.\n\n{"
PAIR = '"{key}": "{value}"'
QUESTION = '\n\nWhich value does the JSON object above have for the key "{key}"? Answer with the value alone.'
ENDING = "\nValue:"


class Row(Fields):
    """The fields of a prediction that `measures` reads. pairs: in the context."""

    id: Printable
    pairs: Count
    found: Flag


ROWS = list[Row]


def needed_tokens(settings: EvalSettings) -> int:
    """Tokens that the longest sequence hardly exceeds; what does is left out by its tokens (`that_fit`)."""
    return max(settings.pairs.pairs) * PAIR_TOKENS + MARGIN_TOKENS


class Builder:
    """Builds contexts for one tokenizer; the same every time for the same settings."""

    def __init__(self, tokenizer: Any, settings: PairsSettings) -> None:
        self.settings = settings
        self.frame = Frame(tokenizer, OPENING, ENDING)

    def document(self, count: int, index: int) -> Document:
        """Pairs, and the question for the value of one.

        Args:
            count: pairs.
            index: which context of so many; decides the pairs and the key.
        """
        generator = random.Random(f"{self.settings.seed} {count} {index}")
        pairs = [[str(uuid.UUID(int=generator.getrandbits(128), version=4)) for _ in range(2)] for _ in range(count)]
        place = generator.randrange(count)
        prompt = self.frame.opening()
        for i, (key, value) in enumerate(pairs):
            prompt += self.frame.encode(PAIR.format(key=key, value=value) + ("}" if i == count - 1 else ",\n "))
        key, value = pairs[place]
        depth = round(place / count, 4)
        about = {"id": f"{count}/{index}", "pairs": count, "depth": depth, "key": key, "value": value}
        return Document(prompt, [Question(self.frame.question(QUESTION.format(key=key)), about)])


def is_found(value: str, answer: str) -> bool:
    """Whether an answer has all digits of a UUID, whatever stands between its groups."""
    digits = re.sub(r"[^0-9a-z]", "", answer.lower())
    return value.replace("-", "") in digits


def run(engine: Engine, settings: EvalSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one question each, and what the sequences held, all and by the number of pairs."""
    task = settings.pairs
    builder = Builder(engine.tokenizer, task)
    documents = {count: [builder.document(count, i) for i in range(task.samples)] for count in task.pairs}
    documents_that_fit = that_fit(engine, "pairs", documents, ANSWER_TOKENS)
    engine.expect(2 * task.samples * len(documents_that_fit))
    rows: list[dict[str, Any]] = []
    held: dict[str, Any] = {}
    stop = () if builder.frame.is_chat else ("\n\n",)
    for count, of_count in documents_that_fit.items():
        answered, held[str(count)] = ask(engine, of_count, ANSWER_TOKENS, stop)
        for _, question, output in answered:
            row = row_of(question, output)
            rows.append(row | {"found": int(is_found(row["value"], row["answer"]))})
    return rows, {"all": [one for of_count in held.values() for one in of_count]} | held


def measures(rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None = None) -> list[Measure]:
    """Share of values found, of all and by pairs."""
    return shares("pairs", rows, "found", "pairs")
