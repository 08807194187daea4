"""Perplexity of WikiText-2 through the engine, with the cache really read.

A prompt that is computed in one chunk attends to keys and values as the model computes them, whatever the cache makes
of them. So windows are computed 128 tokens at a time: all but the newest chunk, and what the cache keeps in full
precision, comes out of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from vllm_lexico.evals.fields import Count, Fields
from vllm_lexico.evals.measure import Measure
from vllm_lexico.evals.settings import EvalSettings
from vllm_lexico.evals.tasks.windows import wikitext_windows

if TYPE_CHECKING:
    from vllm_lexico.evals.engine import Engine

DATA_FILES: tuple[str, ...] = ("wikitext2_raw_test.txt.xz",)
NEEDS_HARNESS = False
LEAVES_SIZES_OUT = False
TOGETHER = 16  # windows side by side: 2,048 tokens per step in chunks of 128, whose logits fit beside any model
MARGIN_TOKENS = 8  # beyond a window
MOST_NATS = 500.0  # exp of it is a number still; guessing among all tokens loses 12


class Row(Fields):
    """The fields of a prediction that `measures` reads. loss: mean of the window, in nats per token."""

    id: Count
    loss: Annotated[float, Field(ge=0, le=MOST_NATS)]


ROWS = list[Row]


def needed_tokens(settings: EvalSettings) -> int:
    """Tokens of the longest sequence that the task will make."""
    return settings.wikitext.length + MARGIN_TOKENS


def run(engine: Engine, settings: EvalSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one window each with its mean loss in nats per token, and what the sequences held."""
    task = settings.wikitext
    path = Path(settings.data) / DATA_FILES[0]
    windows = wikitext_windows(path, engine.tokenizer, task.length, task.count).tolist()
    engine.expect(len(windows))
    together = max(min(TOGETHER, engine.scheduler.max_num_scheduled_tokens // task.chunk), 1)
    rows: list[dict[str, Any]] = []
    for first in range(0, len(windows), together):
        batch = windows[first : first + together]
        with engine.chunks_of(task.chunk, len(batch)):
            # vLLM computes a prompt anew, without a look at the prefix cache, where its log-probabilities are wanted;
            # saying so as well keeps that true. One token is the fewest that it samples.
            outputs = engine.generate(
                batch, max_tokens=1, prompt_logprobs=0, detokenize=False, skip_reading_prefix_cache=True
            )
        for window, output in zip(batch, outputs, strict=True):
            losses = token_losses(window, output.prompt_logprobs)[task.skip :]
            rows.append({"id": len(rows), "loss": sum(losses) / len(losses), "tokens": len(losses)})
    return rows, {"all": engine.meter.take()}


def token_losses(window: Sequence[int], prompt_logprobs: Sequence[Any]) -> list[float]:
    """Losses in nats of all tokens but the first, as vLLM returns log-probabilities of a prompt."""
    return [-prompt_logprobs[i][window[i]].logprob for i in range(1, len(window))]


def measures(rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None = None) -> list[Measure]:
    """The perplexity."""
    return [Measure("wikitext", "perplexity", {row["id"]: row["loss"] for row in rows})]
