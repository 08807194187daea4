"""Loads that one engine is timed under: requests of random tokens, and when each step's tokens came back.

The engine runs as it is served: in a process of its own, with asynchronous scheduling, driven by `LLMEngine.step`.
`vllm bench` measures the same times, but it cannot prepare a cache before the clock starts, and a server with its HTTP
adds milliseconds to a first token that have nothing to do with attention.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

LOWEST_TOKEN = 1000  # below may be tokens that mean something
SETTLE_STEPS = 16  # of decode, before steps count
SLOW = 1.3  # medians; which steps take longer is kept
BLOCK_TOKENS = 128  # a multiple of every backend's blocks: contexts end there so that all of them can be found again

Prompts = list[list[int]]


@dataclass
class Timeline:
    """What came back when: seconds on one clock.

    started: before the first request was handed over.
    first: of each request's first token.
    steps: (seconds, tokens that the step brought) of every step that brought some.
    """

    started: float
    first: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[float, int]] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """From the start to the last token."""
        return self.steps[-1][0] - self.started

    def intervals(self, count: int) -> list[float]:
        """Seconds between steps of decode, each of which brought a token for all of `count` requests."""
        full = [self.steps[i][0] for i in range(len(self.steps)) if self.steps[i][1] == count]
        return [after - before for before, after in itertools.pairwise(full)][SETTLE_STEPS:]


class Driver:
    """Sends requests to an engine; every prompt is new unless said otherwise."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self.vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
        self._generator = torch.Generator().manual_seed(0)
        self._ids = itertools.count()

    def prompts(self, lengths: list[int]) -> Prompts:
        """Random tokens."""
        ids = torch.randint(LOWEST_TOKEN, self.vocabulary, (sum(lengths),), generator=self._generator)
        return [piece.tolist() for piece in ids.split(lengths)]

    def run(self, prompts: Prompts, max_tokens: int) -> Timeline:
        """Send all prompts at once and wait for all tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        timeline = Timeline(time.perf_counter())
        for prompt in prompts:
            self.engine.add_request(str(next(self._ids)), {"prompt_token_ids": prompt}, params)
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            tokens = 0
            for output in outputs:
                tokens += len(output.outputs[0].token_ids)
                timeline.first.setdefault(output.request_id, now)
            if tokens:
                timeline.steps.append((now, tokens))
        return timeline


def first_token(driver: Driver, length: int, repeats: int = 5) -> dict[str, float]:
    """Median time to the first token of one prompt alone, after two that compile what compiles at first use.

    Each answer has a second token, so that no prompt pays for what the step after another's first token does;
    `second_seconds` is the median time that it takes. `cold_seconds`: the first prompt's.
    """
    seconds, second = [], []
    for _ in range(repeats + 2):
        timeline = driver.run(driver.prompts([length]), 2)
        (first,) = timeline.first.values()
        seconds.append(first - timeline.started)
        second.append(timeline.started + timeline.seconds - first)
    return {
        "seconds": statistics.median(seconds[2:]),
        "worst_seconds": max(seconds[2:]),
        "second_seconds": statistics.median(second[2:]),
        "cold_seconds": seconds[0],
    }


def decode(driver: Driver, contexts: Prompts, new_tokens: list[int], steps: int) -> dict[str, Any]:
    """Steps of decode in which every request takes part, from contexts that the prefix cache holds already.

    contexts: prompts that `driver` has run. Each goes on with some new tokens, few enough for one step, so that all
    requests decode from the same step on and stand where `new_tokens` puts them.
    """
    prompts = [context + new for context, new in zip(contexts, driver.prompts(new_tokens), strict=True)]
    in_order = driver.run(prompts, steps + SETTLE_STEPS + 1).intervals(len(prompts))
    intervals = sorted(in_order)
    median = statistics.median(intervals)
    slow = [[step, round(1e3 * seconds, 1)] for step, seconds in enumerate(in_order) if seconds > SLOW * median]
    return {
        "median_ms": 1e3 * median,
        "p99_ms": 1e3 * intervals[min(int(0.99 * len(intervals)), len(intervals) - 1)],
        "worst_ms": 1e3 * intervals[-1],
        "mean_ms": 1e3 * statistics.mean(intervals),
        "tokens_per_second": len(prompts) / statistics.mean(intervals),
        "steps": len(intervals),
        "slow_steps": slow,
    }


def decode_after_fill(
    driver: Driver, count: int, context: int, steps: int, spreads: dict[str, list[int]]
) -> dict[str, Any]:
    """Fill the cache with `count` contexts, each of pages of its own, then decode from them once for each spread."""
    contexts = driver.prompts([context // BLOCK_TOKENS * BLOCK_TOKENS] * count)
    fill = driver.run(contexts, 1)
    results: dict[str, Any] = {name: decode(driver, contexts, new, steps) for name, new in spreads.items()}
    return results | {"fill_tokens_per_second": count * context / fill.seconds}


def starved(driver: Driver, count: int, context: int, new_tokens: int, answer: int, turns: int = 2) -> dict[str, Any]:
    """Turns of as many conversations as some caches cannot hold together, all sent at once; output tokens/s.

    The first turn is a burst of cold prompts. The second repeats all that was said and adds `new_tokens`; what the
    cache has kept need not be computed again, in every backend by vLLM's prefix caching.
    """
    results = {}
    prompts = driver.prompts([context] * count)
    for turn in range(1, turns + 1):
        timeline = driver.run(prompts, answer)
        rate = count * answer / timeline.seconds
        results[str(turn)] = {"tokens_per_second": rate, "seconds": timeline.seconds, "answer_tokens": answer}
        prompts = [old + new for old, new in zip(prompts, driver.prompts([new_tokens] * count), strict=True)]
    return results
