"""Questions about a text that is computed before they come, so that answers read it out of the KV cache.

A document is computed first, and its questions come after it as they would in a conversation: with the prefix cache on,
all of the document but its last block is then read out of the cache. Predictions say how many tokens were.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from vllm_lexico.evals.held import Held
from vllm_lexico.evals.measure import Measure
from vllm_lexico.evals.tasks.windows import adds_bos

if TYPE_CHECKING:
    from vllm_lexico.evals.engine import Engine

POOL_SHARE = 3  # documents that are worked on at a time take this part of the pool at most
_MARK = "<|the document goes here|>"


class HasPrompt(Protocol):
    """prompt: token ids."""

    @property
    def prompt(self) -> list[int]: ...


class HasQuestions(HasPrompt, Protocol):
    """prompt: token ids up to the text's end; questions: what is asked of it, each with the ids that follow."""

    @property
    def questions(self) -> Sequence[HasPrompt]: ...


@dataclass(frozen=True)
class Question:
    """What is asked. prompt: ids that follow the text; about: fields of its row, "id" among them."""

    prompt: list[int]
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Document:
    """A text and its questions. prompt: ids up to its end, with what comes before it."""

    prompt: list[int]
    questions: list[Question]


AnyDocument = TypeVar("AnyDocument", bound=HasQuestions)


class Frame:
    """What stands before a text and after a question, for one tokenizer.

    Args:
        tokenizer: of transformers.
        opening: words before the text.
        ending: words after the question, for a model without a chat template, which then goes on from them.

    Attributes:
        after: words after the question.
        is_chat: whether the model has a chat template; the words around the user's message are then the template's.

    Raises:
        ValueError: the template does not show the user's message as it is.
    """

    def __init__(self, tokenizer: Any, opening: str, ending: str) -> None:
        self.tokenizer = tokenizer
        self.is_chat = bool(getattr(tokenizer, "chat_template", None))
        before, self.after = _template(tokenizer) if self.is_chat else ("", ending)
        self._before = before + opening

    def encode(self, text: str) -> list[int]:
        """Token ids without what a tokenizer puts before a text."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def opening(self) -> list[int]:
        """Ids of what comes before the text, with a begin-of-sequence token where the model wants one and has none."""
        ids = self.encode(self._before)
        bos = self.tokenizer.bos_token_id
        return [bos, *ids] if adds_bos(self.tokenizer) and ids[:1] != [bos] else ids

    def question(self, words: str) -> list[int]:
        """Ids of a question and of what comes after it."""
        return self.encode(words + self.after)


def _template(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and after a user's message. Models that can think first are told not to."""
    message = [{"role": "user", "content": _MARK}]
    shown = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    before, mark, after = shown.partition(_MARK)
    if not mark:
        raise ValueError(
            "the model's chat template does not show the user's message as it is; tasks that ask about a text cannot "
            "use it"
        )
    return before, after


def batches(documents: Sequence[AnyDocument], tokens: int, answer_tokens: int) -> Iterator[list[AnyDocument]]:
    """Documents to work on together, one at least: of at most so many tokens, those of their questions among them.

    Args:
        documents: all.
        tokens: of a batch.
        answer_tokens: of an answer.
    """
    batch: list[AnyDocument] = []
    taken = 0
    for document in documents:
        size = len(document.prompt) + sum(len(each.prompt) + answer_tokens for each in document.questions)
        if batch and taken + size > tokens:
            yield batch
            batch, taken = [], 0
        batch.append(document)
        taken += size
    if batch:
        yield batch


def ask(
    engine: Engine, documents: Sequence[AnyDocument], answer_tokens: int, stop: Sequence[str] = ()
) -> tuple[list[tuple[AnyDocument, Any, Any]], list[Held]]:
    """Compute the documents, then ask their questions after them.

    Args:
        engine: that runs; its prefix cache is emptied after each batch.
        documents: with their questions.
        answer_tokens: of an answer, at most.
        stop: words that end an answer.

    Returns:
        Document, question and vLLM's output of each question, and what its sequences held.
    """
    answered: list[tuple[AnyDocument, Any, Any]] = []
    held: list[Held] = []
    for batch in batches(documents, engine.capacity_tokens() // POOL_SHARE, answer_tokens):
        engine.generate([document.prompt for document in batch], max_tokens=1, detokenize=False)
        engine.meter.take()  # what the documents held alone is no sequence that a user would ask for
        asked = [(document, question) for document in batch for question in document.questions]
        prompts = [document.prompt + question.prompt for document, question in asked]
        outputs = engine.generate(prompts, max_tokens=answer_tokens, stop=list(stop))
        held += engine.meter.take()
        answered += [(d, q, output) for (d, q), output in zip(asked, outputs, strict=True)]
        engine.forget()
    return answered, held


def that_fit(
    engine: Engine, task: str, documents: Mapping[int, Sequence[AnyDocument]], answer_tokens: int
) -> dict[int, Sequence[AnyDocument]]:
    """The documents of the sizes that the engine can read, see `sizes_that_fit`. documents: by size."""
    needed = {
        size: max(len(d.prompt) + max(len(q.prompt) for q in d.questions) for d in of_size) + answer_tokens
        for size, of_size in documents.items()
    }
    return {size: documents[size] for size in sizes_that_fit(engine, task, needed)}


def sizes_that_fit(engine: Engine, task: str, needed: Mapping[int, int]) -> list[int]:
    """The sizes of a task that the engine can read; of others the result's notes have a line.

    Args:
        engine: that runs.
        task: its name, for the line.
        needed: tokens of the longest sequence, by size, which is in whatever the task counts.

    Raises:
        ValueError: none fits.
    """
    limit = engine.max_model_len
    smallest = min(needed, key=lambda size: needed[size])
    if limit < needed[smallest]:
        raise ValueError(
            f"{task} of {smallest} takes {needed[smallest]:,} tokens; allowed: what the engine reads, {limit:,}; ask "
            f"for smaller sizes (vllm-lexico eval --help), or raise --max-model-len where the model allows it"
        )
    for size, tokens in needed.items():
        if tokens > limit:
            engine.note(f"{task} of {size} was left out: it takes {tokens:,} tokens, the engine reads {limit:,}")
    return [size for size, tokens in needed.items() if tokens <= limit]


def row_of(question: Question, output: Any) -> dict[str, Any]:
    """The fields of a prediction that every task has: what the question says of itself, and the answer."""
    return {
        **question.about,
        "answer": output.outputs[0].text,
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
    }


def shares(
    task: str, rows: Sequence[Mapping[str, Any]], score: str, size: str, cluster: str | None = None
) -> list[Measure]:
    """A score of 0 or 1 of all rows, and by size where there are several.

    Args:
        task: name of the figures.
        rows: predictions.
        score, size, cluster: the rows' fields with the score, the size, and what makes rows one cluster.
    """
    sizes = sorted({row[size] for row in rows})
    groups: list[tuple[dict[str, Any], list[Mapping[str, Any]]]] = [({}, list(rows))]
    groups += [({size: one}, [row for row in rows if row[size] == one]) for one in sizes]
    return [
        Measure(
            "_".join([task, *map(str, case.values())]),
            "share",
            {row["id"]: row[score] for row in members},
            {row["id"]: row[cluster] for row in members} if cluster else {},
            case,
        )
        for case, members in groups
    ]
