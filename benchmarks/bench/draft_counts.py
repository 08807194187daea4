"""What `drafts.py` makes of single answers: do they loop, and how far are the shares of accepted drafts apart?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

ALLOWED_POINTS = 0.03  # by which the share of accepted drafts may differ from the peer's
LONGEST_PERIOD, REPEATS = 64, 4  # an end that is so many times the same passage of at most so many tokens is a loop
RESAMPLES = 4000


class Answered(NamedTuple):
    """An answer of an engine: how many drafts were accepted, of how many, and whether it ends in a loop."""

    accepted: int
    drafted: int
    loops: bool


class Apart(NamedTuple):
    """Shares of accepted drafts, ours and the peer's, their difference and its interval of 95 %."""

    ours: float
    theirs: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.ours - self.theirs

    @property
    def verdict(self) -> str:
        """Whether the shares are within `ALLOWED_POINTS`: "within", "not within", or "not shown" by so few answers."""
        if self.low >= -ALLOWED_POINTS and self.high <= ALLOWED_POINTS:
            return "within"
        return "not within" if self.low > ALLOWED_POINTS or self.high < -ALLOWED_POINTS else "not shown"

    @property
    def words(self) -> str:
        """In one line."""
        return (
            f"{self.difference:+.3f} ({self.low:+.3f} to {self.high:+.3f}) away, "
            f"{100 * ALLOWED_POINTS:.0f} points: {self.verdict}"
        )


def loops(tokens: Sequence[int]) -> bool:
    """Whether an answer ends with one passage over and over."""
    for period in range(1, LONGEST_PERIOD + 1):
        end = tokens[-period * REPEATS :]
        if len(end) == period * REPEATS and all(end[i] == end[i % period] for i in range(len(end))):
            return True
    return False


def answered(completion: Any) -> Answered:
    """What vLLM's completion says; without drafts, none of none were accepted."""
    metrics = completion.spec_decode_metrics
    counts = (0, 0)
    if metrics is not None:
        accepted = sum(count * times for count, times in enumerate(metrics.histogram))
        counts = (accepted, metrics.num_draft_tokens)
    return Answered(*counts, loops(completion.token_ids))


def apart(ours: Sequence[Answered], theirs: Sequence[Answered]) -> Apart | None:
    """Compare the shares of accepted drafts of two engines' answers to the same prompts.

    Answers part soon, so that even two engines without a fault accept different drafts; and an answer that repeats
    itself is drafted right throughout. The interval comes from resampling prompts, with the answers of both engines.

    Args:
        ours, theirs: in the same order of prompts.

    Returns:
        None where one of the engines has not drafted.
    """
    counts = np.array([(a.accepted, a.drafted, b.accepted, b.drafted) for a, b in zip(ours, theirs, strict=True)])
    counts = counts.reshape(-1, 4).astype(float)
    sums = counts.sum(0)
    if not sums[1] or not sums[3]:
        return None
    generator = np.random.default_rng(0)
    draws = generator.multinomial(len(counts), np.full(len(counts), 1 / len(counts)), size=RESAMPLES) @ counts
    drawn = draws[:, 0] / np.maximum(draws[:, 1], 1) - draws[:, 2] / np.maximum(draws[:, 3], 1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Apart(sums[0] / sums[1], sums[2] / sums[3], float(low), float(high))


def straight(ours: Sequence[Answered], theirs: Sequence[Answered]) -> Apart | None:
    """The same of prompts whose answers loop in neither engine."""
    pairs = [pair for pair in zip(ours, theirs, strict=True) if not any(one.loops for one in pair)]
    return apart([one for one, _ in pairs], [other for _, other in pairs])
