"""Drafts: are as many accepted from codes as from bf16, do answers loop, and what do drafts buy?

    python benchmarks/drafts.py MODEL --drafts '{"method": "eagle3", "model": "ORG/HEAD", "num_speculative_tokens": 3}'
    python benchmarks/drafts.py MODEL --drafts '{"method": "draft_model", "num_speculative_tokens": 3}' --rounded 4

Prompts of real text of 100 to 8,000 tokens, answered by vLLM's own backend and by LEXICO, with the same drafts and
without, in engines one after another; --at-once runs those with drafts side by side, and leaves speed out. Greedy
answers say how many drafts are accepted and how fast; sampled ones (--sampled), which a model does not repeat by
itself, whether any ends in a loop. A draft model without a name is the model itself, rounded to --rounded bits.
Whether the cache is managed right with drafts is asked by
`python benchmarks/exactness.py MODEL --settings '{"speculative_config": {...}}'`, with the exact codec.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.record import RESULTS, record

LENGTHS = (100, 300, 1000, 2000, 4000, 8000)
COUNTS = ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens")
ALLOWED_POINTS = 0.03  # by which the share of accepted drafts may differ from the peer's
LONGEST_PERIOD, REPEATS = 64, 4  # an end that is so many times the same passage of at most so many tokens is a loop
TEMPERATURE, TOP_P = 0.8, 0.95  # of sampled answers
PASSED_ON = ("requests", "answer", "sampled", "sampled_tokens", "longest")  # options that an engine's process is told
Found = dict[str, dict[str, Any]]  # of greedy and sampled answers


def loops(tokens: list[int]) -> bool:
    """Whether an answer ends with one passage over and over."""
    for period in range(1, LONGEST_PERIOD + 1):
        end = tokens[-period * REPEATS :]
        if len(end) == period * REPEATS and all(end[i] == end[i % period] for i in range(len(end))):
            return True
    return False


def ask(engine: Any, count: int, tokens: int, temperature: float, longest: int) -> dict[str, Any]:
    """Answer prompts and say what was counted: drafts, seconds, answers that loop."""
    from vllm import SamplingParams

    lengths = [length for length in LENGTHS if length <= longest]
    prompts = [engine.passage(number, lengths[number % len(lengths)]) for number in range(count)]
    params = [
        SamplingParams(temperature=temperature, top_p=TOP_P, seed=number, max_tokens=tokens, ignore_eos=True)
        if temperature
        else SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for number in range(count)
    ]
    engine.llm.reset_prefix_cache()
    before, start = [engine.count(name) for name in COUNTS], time.perf_counter()
    outputs = engine.llm.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    accepted, drafted = (engine.count(name) - old for name, old in zip(COUNTS, before, strict=True))
    said = [list(output.outputs[0].token_ids) for output in outputs]
    found = {"answers": count, "tokens": tokens, "accepted": accepted, "drafted": drafted}
    return found | {"tokens_per_s": sum(map(len, said)) / seconds, "loops": sum(map(loops, said))}


def run(args: argparse.Namespace) -> None:
    """Answer all prompts with one engine and write what was counted."""
    from exactness import Engine

    longest = args.longest + max(args.answer, args.sampled_tokens) + 64
    settings: dict[str, Any] = {"max_model_len": longest, "max_num_seqs": max(args.requests, args.sampled, 1)}
    settings |= args.settings | ({"speculative_config": args.drafts} if args.drafts else {})
    engine = Engine(args.model, args.backend, args.lexico, **settings)
    ask(engine, 1, args.answer, 0, args.longest)  # kernels are compiled
    found = {"greedy": ask(engine, args.requests, args.answer, 0, args.longest)}
    if args.sampled:
        found["sampled"] = ask(engine, args.sampled, args.sampled_tokens, TEMPERATURE, args.longest)
    args.out.write_text(json.dumps(found))


def keep(folder: Path, case: dict[str, Any], *measured: Any) -> None:
    """Record a row and print it."""
    row = record("drafts", case, *measured, folder=folder)
    print(f"{row['metric']}: {row['value']:.4g}, {row['peer']}: {row['peer_value']} {case}", flush=True)


def run_engines(args: argparse.Namespace) -> dict[tuple[str, bool], Found]:
    """What each engine has counted, by backend and whether it drafts."""
    engines = [(backend, drafts) for drafts in (True, False) for backend in (args.peer, "LEXICO")]
    engines = engines[:2] if args.at_once else engines
    with tempfile.TemporaryDirectory() as folder:
        outs, commands = {}, []
        for backend, drafts in engines:
            outs[backend, drafts] = out = Path(folder) / f"{backend}-{drafts}.json"
            command = [sys.executable, __file__, args.model, "--backend", backend, "--out", str(out)]
            command += ["--drafts", json.dumps(args.drafts if drafts else {}), "--settings", json.dumps(args.settings)]
            command += ["--lexico", json.dumps(args.lexico)]
            for name in PASSED_ON:
                command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
            commands.append(command)
        running: list[subprocess.Popen] = []
        for command in commands:
            running.append(subprocess.Popen(command))
            if not args.at_once and running[-1].wait():
                sys.exit(f"an engine failed: {command}")
        if sum(process.wait() != 0 for process in running):
            sys.exit("an engine failed")
        return {key: json.loads(out.read_text()) for key, out in outs.items()}


def orchestrate(args: argparse.Namespace) -> None:
    """Run the engines, then compare what they counted."""
    with tempfile.TemporaryDirectory() as folder:
        if args.rounded and "model" not in args.drafts:
            from bench.rounded_model import write_rounded_model

            args.drafts["model"] = str(write_rounded_model(Path(args.model), Path(folder), args.rounded))
        found = run_engines(args)
    lexico = {name: Path(one).name if name == "dictionary" else one for name, one in args.lexico.items()}
    case = {"model": Path(args.model).name, "method": args.drafts.get("method"), "lexico": lexico}
    drafting = Path(args.drafts.get("model", "")).name if not args.rounded else f"rounded to {args.rounded} bits"
    case |= {"drafts": args.drafts.get("num_speculative_tokens"), "draft_model": drafting, "longest": args.longest}
    apart = {}
    for (_, drafts), answers in (item for item in found.items() if item[0][0] == "LEXICO"):
        for how, ours in answers.items():
            theirs = found[args.peer, drafts][how]
            more = case | {"with_drafts": drafts, "answers": how, "requests": ours["answers"]}
            more |= {"answer_tokens": ours["tokens"], "at_once": args.at_once}
            if drafts:
                shares = [one["accepted"] / max(one["drafted"], 1) for one in (ours, theirs)]
                drafted = {"drafted": ours["drafted"], "peer_drafted": theirs["drafted"]}
                keep(args.results, more | drafted, "accepted_share", shares[0], args.peer, shares[1])
                apart[how] = shares[0] - shares[1]
            if not args.at_once and how == "greedy":
                keep(args.results, more, "tokens_per_s", ours["tokens_per_s"], args.peer, theirs["tokens_per_s"])
            keep(args.results, more | {"peer_looping_answers": theirs["loops"]}, "looping_answers", ours["loops"])
    if abs(apart["greedy"]) > ALLOWED_POINTS:
        sys.exit(f"the share of accepted drafts is {apart['greedy']:+.3f} away from {args.peer}'s")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--drafts", type=json.loads, required=True, metavar="JSON", help="vLLM's speculative_config")
    parser.add_argument("--rounded", type=int, metavar="BITS", help="of the copy of the model that drafts for it")
    parser.add_argument("--lexico", type=json.loads, default={}, metavar="JSON", help="settings of LEXICO")
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="more settings of vLLM")
    parser.add_argument("--peer", default="FLASH_ATTN", help="vLLM's backend to compare with")
    parser.add_argument("--requests", type=int, default=48, help="greedy answers (default: %(default)s)")
    parser.add_argument("--answer", type=int, default=300, help="tokens of each (default: %(default)s)")
    parser.add_argument("--sampled", type=int, default=0, help="sampled answers (default: none)")
    parser.add_argument("--sampled-tokens", type=int, default=1000, help="of each (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="prompt (default: %(default)s tokens)")
    parser.add_argument("--at-once", action="store_true", help="side by side, with drafts alone and no speed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of drafts.jsonl")
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    (run if args.backend else orchestrate)(args)


if __name__ == "__main__":
    main()
