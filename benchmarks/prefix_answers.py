"""Do answers change when a prompt comes from the prefix cache, and what does the setting cost that prevents it?

    python benchmarks/prefix_answers.py MODEL --dictionary FILE --enforce-eager

For each value of the setting `prefix_hits` an engine answers prompts of real text cold and again from the cache. Counts
answers that differ, and those that differ in the first token already; takes the mean loss of the last 256 tokens of
each prompt, computed cold, and the time to the first token of one long cold prompt. Rows go to
benchmarks/results/prefix_answers.jsonl, with "codes", the default, as the peer of the other two.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.record import record
from bench.texts import TEXT

VALUES = ("codes", "window", "same")
LOSS_TOKENS = 256
REPEATS = 5  # of the long prompt after one that warms up; the median counts
SHORTEST = 600


def make_prompts(ids: list[int], options: argparse.Namespace) -> list[list[int]]:
    """Passages of real text, of lengths spread from 600 tokens, or --tokens if that is less, up to --tokens."""
    first, count = min(SHORTEST, options.tokens), options.prompts
    lengths = [first + (options.tokens - first) * i // max(count - 1, 1) for i in range(count)]
    return [passage(ids, length, seed) for seed, length in enumerate(lengths)]


def passage(ids: list[int], length: int, seed: int) -> list[int]:
    """So many tokens from a place that the seed names."""
    start = random.Random(seed).randrange(max(len(ids) - length, 1))
    return (ids * -(-(start + length) // len(ids)))[start : start + length]


class Engine:
    """An engine with one value of `prefix_hits`."""

    def __init__(self, hits: str, options: argparse.Namespace) -> None:
        from vllm import LLM

        lexico: dict[str, Any] = {"prefix_hits": hits, "sparsity": options.sparsity}
        if options.dictionary:
            lexico["dictionary"] = options.dictionary
        memory = {"gpu_memory_utilization": options.memory} if options.memory else {}
        self.llm = LLM(
            options.model,
            attention_backend="LEXICO",
            additional_config={"lexico": lexico},
            enforce_eager=options.enforce_eager,
            max_model_len=max(options.tokens + options.answer_tokens, options.long + 1),
            max_num_batched_tokens=8192,
            seed=0,
            **memory,
        )
        self.ids: list[int] = self.llm.get_tokenizer()(TEXT[: 1 << 20])["input_ids"]

    def ask(self, prompts: list[list[int]], **params: Any) -> list[Any]:
        """What vLLM puts out for greedy answers."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, ignore_eos=True, **params)
        return self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)

    def loss(self, prompts: list[list[int]]) -> float:
        """Mean loss in nats of the last tokens of each prompt; vLLM computes such prompts cold."""
        losses = []
        for output, ids in zip(self.ask(prompts, max_tokens=1, prompt_logprobs=0), prompts, strict=True):
            last = range(max(len(ids) - LOSS_TOKENS, 1), len(ids))
            losses.append(statistics.fmean(-output.prompt_logprobs[i][ids[i]].logprob for i in last))
        return statistics.fmean(losses)

    def first_token_ms(self, length: int) -> float:
        """Median time of a cold prompt's first token, once one has warmed up."""
        times = []
        for seed in range(REPEATS + 1):
            self.llm.reset_prefix_cache()
            prompt = [passage(self.ids, length, 1000 + seed)]
            began = time.perf_counter()
            self.ask(prompt, max_tokens=1, detokenize=False)
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:]) * 1000


def measure(hits: str, options: argparse.Namespace) -> dict[str, float]:
    """All figures of one value of `prefix_hits`."""
    engine = Engine(hits, options)
    prompts = make_prompts(engine.ids, options)
    cold, again = (
        # One after another: in a batch of others, rounding alone may change an answer.
        [engine.ask([prompt], max_tokens=options.answer_tokens)[0] for prompt in prompts]
        for _ in range(2)
    )
    said = [tuple(list(output.outputs[0].token_ids) for output in pair) for pair in zip(cold, again, strict=True)]
    found = {
        "answers_that_differ": float(sum(one != other for one, other in said)),
        "first_tokens_that_differ": float(sum(one[0] != other[0] for one, other in said)),
        "hit_share": sum(output.num_cached_tokens for output in again) / sum(map(len, prompts)),
        "loss_nats": engine.loss(prompts),
    }
    if options.long:
        found["first_token_ms"] = engine.first_token_ms(options.long)
    del engine
    gc.collect()
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()
    return found


def main() -> None:
    """Measure each value, print and record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--dictionary", help="a file; searched for if left out")
    parser.add_argument("--sparsity", type=int, default=15)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=3000, help="of the longest prompt")
    parser.add_argument("--answer-tokens", type=int, default=64)
    parser.add_argument("--long", type=int, default=8192, help="tokens of the prompt that is timed; 0 times none")
    parser.add_argument("--memory", type=float, help="share of the GPU's memory for vLLM")
    parser.add_argument("--enforce-eager", action="store_true", help="start in a third of the time")
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES))
    options = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    case = {"model": Path(options.model).name, "sparsity": options.sparsity, "prompts": options.prompts}
    case |= {"longest": options.tokens, "answer_tokens": options.answer_tokens, "long": options.long}
    case |= {"enforce_eager": options.enforce_eager}
    peer: dict[str, float] = {}
    for hits in sorted(options.values, key=VALUES.index):  # "codes", the peer, first
        figures = measure(hits, options)
        for metric, value in figures.items():
            named = "codes" if peer else None
            record(
                "prefix_answers", case | {"prefix_hits": hits}, metric, value, peer=named, peer_value=peer.get(metric)
            )
            print(f"{hits}: {metric} {value:.4g}", file=sys.stderr, flush=True)
        if hits == "codes":
            peer = figures


if __name__ == "__main__":
    main()
