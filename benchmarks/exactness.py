"""Is the cache's management right? LEXICO's exact codec against vLLM's own backends, token by token.

    python benchmarks/exactness.py MODEL --backends FLASH_ATTN TRITON_ATTN LEXICO --out DIR

With the exact codec, codes are the vectors themselves, so LEXICO must answer as any other backend does. Each backend
runs the same scenarios in engines of its own; greedy tokens are compared until they part, log-probabilities of all
tokens before that, and where they part the two tokens must have been as good as tied. The distance between the first
two backends is the noise that the third is judged by.

Scenarios: plain; prompts that share prefixes; multi-turn; a crowd of requests of mixed length; prefill in chunks of 64;
a pool so small that requests are preempted. Last, with real codes, a request alone and in a crowd of 63 others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.record import record
from bench.terminated import end_orderly
from bench.texts import TEXT

from vllm_lexico.processes import stop

ANSWER_TOKENS = 32
PREEMPTED_TOKENS = 200
CROWD = 64
ALTERNATIVES = 8  # best tokens kept a position, to tell a tie from an error where two backends part
# LEXICO may be this much further from a backend of vLLM than two of those are from each other. A margin for chance, not
# a measured one: the first run stayed below 1.04 everywhere.
ALLOWED_RATIO = 1.25
Prompts = list[list[int]]
Answers = list[dict[str, Any]]


class Engine:
    """A vLLM engine with a backend; `answer` is greedy and keeps log-probabilities."""

    def __init__(
        self, model: str, backend: str, lexico: dict[str, Any], characters: int = 4 << 20, **settings: Any
    ) -> None:
        """Start it; `characters` of text are tokenized for its prompts."""
        from vllm import LLM

        if backend == "LEXICO":
            settings["additional_config"] = {"lexico": lexico}
        self.llm = LLM(model, attention_backend=backend, disable_log_stats=False, **settings)
        tokenizer = self.llm.get_tokenizer()
        self.text_tokens: list[int] = tokenizer(TEXT[:characters])["input_ids"]

    def passage(self, seed: int, length: int) -> list[int]:
        """`length` tokens of real text from a place that the seed names."""
        start = random.Random(seed).randrange(len(self.text_tokens) - length)
        return self.text_tokens[start : start + length]

    def answer(self, prompts: Prompts, max_tokens: int = ANSWER_TOKENS) -> Answers:
        """Token ids, and the best tokens of every position with their log-probabilities."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=ALTERNATIVES)
        outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [_answer(output.outputs[0]) for output in outputs]

    def count(self, metric: str) -> int:
        """Value of one of vLLM's counters."""
        return int(sum(m.value for m in self.llm.get_metrics() if m.name == metric))


def _answer(completion: Any) -> dict[str, Any]:
    steps = [{int(token): entry.logprob for token, entry in step.items()} for step in completion.logprobs]
    return {"tokens": list(completion.token_ids), "steps": steps}


def plain(engine: Engine, scale: int) -> tuple[Answers, dict[str, int]]:
    """Prompts of lengths around the sizes that pages and groups have."""
    lengths = [1, 31, 32, 33, 63, 127, 128, 129, 160, 255, 257, 300, 384, 511, 640, 900]
    some = max(4 // scale, 1)  # of them: every fourth in a quick look, the longest among them
    prompts = [engine.passage(i, length) for i, length in enumerate(lengths[some - 1 :: some])]
    return engine.answer(prompts, 2 * ANSWER_TOKENS), {}


def shared_prefixes(engine: Engine, scale: int) -> tuple[Answers, dict[str, int]]:
    """A first request, then others that share its first 600 tokens; hits are counted."""
    before = engine.count("vllm:prefix_cache_hits")
    prefix = engine.passage(50, 600)
    answers = engine.answer([prefix + engine.passage(51, 40)])
    answers += engine.answer([prefix + engine.passage(52 + i, 20 + 30 * i) for i in range(2 * scale)])
    answers += engine.answer([prefix[:300] + engine.passage(70, 90), prefix])
    return answers, {"hits": engine.count("vllm:prefix_cache_hits") - before}


def multi_turn(engine: Engine, scale: int) -> tuple[Answers, dict[str, int]]:
    """Conversations whose turns repeat all that was said, answers included; hits are counted."""
    before = engine.count("vllm:prefix_cache_hits")
    histories = [engine.passage(100 + i, 200 + 37 * i) for i in range(scale)]
    answers: Answers = []
    for turn in range(4):
        replies = engine.answer(histories)
        answers += replies
        for i, reply in enumerate(replies):
            histories[i] = histories[i] + reply["tokens"] + engine.passage(200 + 10 * turn + i, 50)
    return answers, {"hits": engine.count("vllm:prefix_cache_hits") - before}


def crowd(engine: Engine, scale: int) -> tuple[Answers, dict[str, int]]:
    """Many requests of mixed length in random order (500 at full scale)."""
    count = 125 * scale if scale > 1 else 16
    lengths = [random.Random(i).choice([5, 40, 100, 129, 250, 400, 700]) for i in range(count)]
    order = list(range(len(lengths)))
    random.Random(0).shuffle(order)
    answers = engine.answer([engine.passage(1000 + i, lengths[i]) for i in order])
    return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])], {}


def chunked(engine: Engine, scale: int) -> tuple[Answers, dict[str, int]]:
    """Prompts that are computed 64 tokens a step."""
    return engine.answer([engine.passage(300 + i, 90 + 444 // scale * i) for i in range(2 * scale)]), {}


def same_step(engine: Engine, scale: int) -> tuple[Answers, dict[str, int]]:
    """A request that hits a block in the very step that completes it, a step of decode.

    In steps of 64 tokens the second prompt computes 3, then 63 beside the first one's decode, four times, and the last
    token of its fourth block in a step that has room for the third request.
    """
    prompt = engine.passage(350, 257)
    return engine.answer([engine.passage(351, 61), prompt[:256], prompt]), {}


def preempted(engine: Engine, scale: int) -> tuple[Answers, dict[str, int]]:
    """More requests than the pool holds at their full length; preemptions are counted.

    Answers are so long that what steps of decode code leaves the window and is read from there on.
    """
    before = engine.count("vllm:num_preemptions")
    answers = engine.answer([engine.passage(400 + i, 200) for i in range(4 * scale)], PREEMPTED_TOKENS)
    return answers, {"preemptions": engine.count("vllm:num_preemptions") - before}


def alone_and_in_crowd(engine: Engine, scale: int) -> tuple[Answers, dict[str, int]]:
    """The same requests alone and among others; compare the first half with the second.

    At full scale answers are so long that codes are read that steps of decode have written.
    """
    prompts = [engine.passage(500 + i, 150 + 100 * i) for i in range(scale)]
    others = [engine.passage(600 + i, 60 + 9 * i) for i in range(CROWD - 1 if scale > 1 else 9)]
    alone, among = [], []
    for i, prompt in enumerate(prompts):
        engine.llm.reset_prefix_cache()
        alone += engine.answer([prompt], scale * ANSWER_TOKENS)
        engine.llm.reset_prefix_cache()
        place = len(others) // 3 + i
        crowded = [*others[:place], prompt, *others[place:]]
        among.append(engine.answer(crowded, scale * ANSWER_TOKENS)[place])
    return alone + among, {}


Scenario = Callable[[Engine, int], tuple[Answers, dict[str, int]]]
# Scenarios by the engine settings that they need; `pool_tokens` is a pool of that many tokens at full precision.
# With the exact codec a tail page has as many tokens as a block, and the window reaches back to a page's start: blocks
# of 64 leave the fewest tokens in it.
ENGINES: dict[str, tuple[dict[str, Any], list[Scenario]]] = {
    "default": ({}, [plain, shared_prefixes, multi_turn, crowd]),
    "chunks": ({"max_num_batched_tokens": 64, "max_num_seqs": 16, "block_size": 64}, [chunked, same_step]),
    "small": ({"pool_tokens": 1280, "block_size": 64}, [preempted]),
    "codes": ({}, [alone_and_in_crowd]),
}
SMALLEST_WINDOW = {"window": 0}  # as many tokens as may wait to be coded, 63


def start(
    name: str, model: str, backend: str, lexico: dict[str, Any], settings: dict[str, Any], **more: Any
) -> tuple[Engine, list[Scenario]]:
    """Start an engine of ENGINES on a backend.

    Args:
        name: of the engine.
        model: a checkpoint's folder or id.
        backend: an attention backend's name.
        lexico: settings of the engine with real codes; the others take the exact codec.
        settings: more of vLLM's.
        more: of `Engine`.

    Returns:
        The engine and the scenarios that it is for.
    """
    own, scenarios = ENGINES[name]
    settings = {"max_model_len": 2048} | own | settings
    pool_tokens = settings.pop("pool_tokens", None)
    lexico = lexico if name == "codes" else {"codec": "exact"}
    if name != "default":
        lexico = SMALLEST_WINDOW | lexico
    if pool_tokens:
        # With the exact codec a request holds as much again in tail pages: its window and its sinks.
        tail_pages = 1 if backend == "LEXICO" else 0
        per_block = settings.get("block_size") or 128
        settings |= {"num_gpu_blocks_override": pool_tokens // per_block * (1 + tail_pages), "block_size": per_block}
        settings["max_model_len"] = 512
    return Engine(model, backend, lexico, **settings, **more), scenarios


def run(args: argparse.Namespace) -> None:
    """Run the scenarios of one engine on one backend and write the answers."""
    engine, scenarios = start(args.engine, args.model, args.backend, args.lexico, args.settings)
    results = {}
    for scenario in scenarios:
        engine.llm.reset_prefix_cache()
        answers, counts = scenario(engine, args.scale)
        results[scenario.__name__] = {"answers": answers, "counts": counts}
        print(f"{args.backend} {scenario.__name__}: {len(answers)} answers {counts}", file=sys.stderr, flush=True)
    args.out.write_text(json.dumps(results))


def compare(one: Answers, other: Answers) -> dict[str, float]:
    """Distances of log-probabilities up to where tokens part, and how far from a tie that was."""
    gaps, partings, agreed = [], [], 0
    for a, b in zip(one, other, strict=True):
        for token, other_token, step, other_step in zip(a["tokens"], b["tokens"], a["steps"], b["steps"], strict=True):
            step, other_step = ({int(t): p for t, p in s.items()} for s in (step, other_step))
            if token != other_token:
                # How much worse each thought the other's choice; a token outside the best ones is no tie.
                partings.append(max(_regret(step, other_token), _regret(other_step, token)))
                break
            gaps.append(abs(step[token] - other_step[token]))
            agreed += 1
    return {
        "tokens": agreed,
        "mean": sum(gaps) / max(len(gaps), 1),
        "p99": sorted(gaps)[int(0.99 * (len(gaps) - 1))] if gaps else math.nan,
        "max": max(gaps, default=math.nan),
        "partings": len(partings),
        "worst_parting": max(partings, default=0.0),
    }


def _regret(step: dict[int, float], token: int) -> float:
    return max(step.values()) - step.get(token, -math.inf)


def orchestrate(args: argparse.Namespace) -> None:
    """Run every engine of every backend, side by side where asked to, then print the table."""
    args.out.mkdir(parents=True, exist_ok=True)
    jobs: list[tuple[list[str], Path]] = []
    running: list[subprocess.Popen] = []
    for engine in ENGINES:
        for backend in args.backends:
            if engine == "codes" and backend not in (args.backends[0], "LEXICO"):
                continue
            out = args.out / f"{engine}-{backend}.json"
            command = [sys.executable, __file__, args.model, "--engine", engine, "--backend", backend]
            command += ["--out", str(out), "--scale", str(args.scale), "--settings", json.dumps(args.settings)]
            jobs.append(([*command, "--lexico", json.dumps(args.lexico)], out))
    try:
        for command, out in jobs:
            out.unlink(missing_ok=True)  # an earlier run's answers must not stand for an engine that fails now
            while len(running) >= args.parallel:
                running.pop(0).wait()
            with out.with_suffix(".log").open("w") as log:
                running.append(subprocess.Popen(command, stderr=log, stdout=subprocess.DEVNULL, start_new_session=True))
        for process in running:
            process.wait()
    finally:
        for process in running:
            stop(process)
    failed = [out for _, out in jobs if not out.exists()]
    for out in failed:
        print(f"{out.stem} failed:\n{out.with_suffix('.log').read_text()[-3000:]}", file=sys.stderr)
    table = summarize(args.out, args.backends)
    (args.out / "table.json").write_text(json.dumps(table, indent=1))
    for row in table:
        numbers = " ".join(f"{name} {value:.5g}" for name, value in row.items() if isinstance(value, float | int))
        print(f"{row['scenario']:18} {row['pair']:28} {numbers}  {row.get('counts', '')}")
    too_far = judge(table, args) if len(args.backends) == 3 and not failed else []
    for words in too_far:
        print(f"too far: {words}", file=sys.stderr)
    sys.exit(bool(failed or too_far))


def judge(table: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """Record LEXICO's distance beside that of vLLM's own backends; what is too far, in words.

    The distance is that from the first backend, beside the second's from it; where a backend is compared with itself,
    LEXICO's from itself beside the first's from itself.
    """
    first, second, ours = args.backends
    rows = {(row["scenario"], row["pair"]): row for row in table}
    too_far = []
    for scenario in dict.fromkeys(row["scenario"] for row in table):
        if (noise := rows.get((scenario, f"{first} {second}"))) is not None:
            row, peer = rows[scenario, f"{first} {ours}"], second
        else:
            noise, row, peer = rows[scenario, f"{first} with itself"], rows[scenario, f"{ours} with itself"], first
        case = {"model": Path(args.model).name, "scenario": scenario, "backend": ours, "tokens": row["tokens"]}
        kept = record("exactness", case, "logprob_gap_mean", row["mean"], peer, noise["mean"])
        if kept["ratio"] > ALLOWED_RATIO:
            too_far.append(f"{scenario}: {row['mean']:.4g} against {noise['mean']:.4g}")
    return too_far


def summarize(folder: Path, backends: list[str]) -> list[dict[str, Any]]:
    """All pairs of backends in all scenarios that ran, and counts where a scenario counts something."""
    table: list[dict[str, Any]] = []
    for engine in ENGINES:
        results = {b: json.loads(p.read_text()) for b in backends if (p := folder / f"{engine}-{b}.json").exists()}
        if engine == "codes":
            for backend, scenarios in results.items():
                for name, result in scenarios.items():
                    answers = result["answers"]
                    half = len(answers) // 2
                    table.append(
                        {"scenario": name, "pair": f"{backend} with itself"} | compare(answers[:half], answers[half:])
                    )
            continue
        pairs = [(a, b) for i, a in enumerate(results) for b in list(results)[i + 1 :]]
        for a, b in pairs:
            for name in results[a]:
                one, other = results[a][name], results[b][name]
                row = {"scenario": name, "pair": f"{a} {b}"} | compare(one["answers"], other["answers"])
                if one["counts"]:
                    row["counts"] = {a: one["counts"], b: other["counts"]}
                table.append(row)
    return table


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--backends", nargs="+", default=["FLASH_ATTN", "TRITON_ATTN", "LEXICO"])
    parser.add_argument("--out", type=Path, required=True, help="folder for answers, logs and table.json")
    parser.add_argument("--scale", type=int, default=4, help="1 is a quick look, 4 has 500 requests in the crowd")
    parser.add_argument("--parallel", type=int, default=1, help="engines at a time")
    parser.add_argument("--settings", type=json.loads, default={}, help="more settings of vLLM's LLM(), as JSON")
    parser.add_argument("--lexico", type=json.loads, default={}, help="LEXICO settings of the scenario with real codes")
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if args.engine:
        run(args)
    else:
        end_orderly()
        orchestrate(args)


if __name__ == "__main__":
    main()
