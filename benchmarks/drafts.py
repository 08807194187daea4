"""Drafts: are as many accepted from codes as from bf16, do answers loop, and what do drafts buy?

    python benchmarks/drafts.py MODEL --drafts '{"method": "eagle3", "model": "ORG/HEAD", "num_speculative_tokens": 3}'
    python benchmarks/drafts.py MODEL --drafts '{"method": "draft_model", "num_speculative_tokens": 3}' --rounded 4

Prompts of real text of 100 to 8,000 tokens, answered by vLLM's own backend and by LEXICO, with the same drafts and
without, in engines one after another; --at-once runs those with drafts side by side, and leaves speed out. Greedy
answers say how many drafts are accepted and how fast. They part soon between any two engines, and one that repeats
itself is drafted right throughout; so the shares' difference has an interval over prompts, and another one without
answers that loop, and short answers to many prompts (--brief) ask for drafts of nearly the same text. Sampled answers
(--sampled), in which a model does not repeat itself, say whether any ends in a loop. The exit status is 0 where every
difference is shown to be within 3 points. A draft model without a name is the model itself, rounded to --rounded bits.
Whether the cache is managed right with drafts is asked by
`python benchmarks/exactness.py MODEL --settings '{"speculative_config": {...}}'`, with the exact codec.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.draft_counts import Answered, answered, apart, straight
from bench.record import RESULTS, record
from bench.terminated import end_orderly
from lexico_kernels.files import write_whole

LENGTHS = (100, 300, 1000, 2000, 4000, 8000)
BRIEF_TOKENS = 16
TEMPERATURE, TOP_P = 0.8, 0.95  # of sampled answers
# Options that an engine's process is told.
PASSED_ON = ("requests", "answer", "brief", "sampled", "sampled_tokens", "longest")
Found = dict[str, dict[str, Any]]  # of greedy, brief and sampled answers


def ask(engine: Any, count: int, tokens: int, temperature: float, longest: int) -> dict[str, Any]:
    """Answer prompts: what each answer is like, and tokens per second."""
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
    start = time.perf_counter()
    outputs = engine.llm.generate([{"prompt_token_ids": one} for one in prompts], params, use_tqdm=False)
    seconds, said = time.perf_counter() - start, [output.outputs[0] for output in outputs]
    found = {"tokens": tokens, "answers": [answered(one) for one in said]}
    return found | {"tokens_per_s": sum(len(one.token_ids) for one in said) / seconds}


def asked_of(args: argparse.Namespace) -> dict[str, tuple[int, int, float]]:
    """How many answers, of how many tokens and at which temperature, most wanted first."""
    asked = {
        "brief": (args.brief, BRIEF_TOKENS, 0.0),
        "greedy": (args.requests, args.answer, 0.0),
        "sampled": (args.sampled, args.sampled_tokens, TEMPERATURE),
    }
    return {how: one for how, one in asked.items() if one[0]}


def run(args: argparse.Namespace) -> None:
    """Answer all prompts with one engine and write what was counted."""
    from exactness import Engine

    longest = args.longest + max(args.answer, args.sampled_tokens) + 64
    settings: dict[str, Any] = {"max_model_len": longest, "max_num_seqs": max(args.requests, args.sampled, 1)}
    if args.drafts:
        settings |= {"speculative_config": args.drafts, "per_request_spec_decode_metrics": "summary"}
    settings |= args.settings
    engine = Engine(args.model, args.backend, args.lexico, **settings)
    ask(engine, 1, args.answer, 0, args.longest)  # kernels are compiled
    found = {}
    for how, asked in asked_of(args).items():
        found[how] = ask(engine, *asked, args.longest)
        write_whole(args.out, json.dumps(found))  # each time, for what is ended


def keep(folder: Path, case: dict[str, Any], *measured: Any) -> None:
    """Record a row and print it."""
    row = record("drafts", case, *measured, folder=folder)
    print(f"{row['metric']}: {row['value']:.4g}, {row['peer']}: {row['peer_value']} {case}", flush=True)


def run_engines(args: argparse.Namespace) -> dict[tuple[str, bool], Found]:
    """What each engine has counted, by backend and whether it drafts."""
    engines = [(backend, drafts) for drafts in (True, False) for backend in (args.peer, "LEXICO")]
    engines = engines[:2] if args.at_once else engines
    end = time.monotonic() + args.seconds
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
        for batch in [commands] if args.at_once else [[command] for command in commands]:
            wait_for(batch, end)
        return {key: json.loads(out.read_text()) if out.exists() else {} for key, out in outs.items()}


def wait_for(commands: list[list[str]], end: float) -> None:
    """Run engines side by side, and end those that are not done in time."""
    running = [subprocess.Popen(command, start_new_session=True) for command in commands]
    try:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.monotonic(), 0))
    finally:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()


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
    compare(args, case, found)


def compare(args: argparse.Namespace, case: dict[str, Any], found: dict[tuple[str, bool], Found]) -> None:
    """Record what engines counted; ends the process where something is missing, or shares not shown to be near."""
    faults = []
    for backend, drafts in found:
        if missing := set(asked_of(args)) - set(found[backend, drafts]):
            faults.append(f"{backend} failed, or was ended, before it gave {' and '.join(sorted(missing))} answers")
    for (_, drafts), answers in (item for item in found.items() if item[0][0] == "LEXICO"):
        for how in (how for how in answers if how in found[args.peer, drafts]):
            said, peer = answers[how], found[args.peer, drafts][how]
            ours, theirs = ([Answered(*one) for one in side["answers"]] for side in (said, peer))
            more = case | {"with_drafts": drafts, "answers": how, "requests": len(ours)}
            more |= {"answer_tokens": said["tokens"], "at_once": args.at_once}
            if drafts and (fault := keep_shares(args, more, ours, theirs)):
                faults.append(f"the share of accepted drafts, {how}: {fault}")
            if not args.at_once and how == "greedy":
                keep(args.results, more, "tokens_per_s", said["tokens_per_s"], args.peer, peer["tokens_per_s"])
            looping = [sum(one.loops for one in side) for side in (ours, theirs)]
            keep(args.results, more | {"peer_looping_answers": looping[1]}, "looping_answers", looping[0])
    if faults:
        sys.exit("\n".join(faults))


def keep_shares(
    args: argparse.Namespace, case: dict[str, Any], ours: list[Answered], theirs: list[Answered]
) -> str | None:
    """Record the shares of accepted drafts, with their interval; what is wrong with them, in words."""
    case |= {name: sum(one.drafted for one in side) for name, side in (("drafted", ours), ("peer_drafted", theirs))}
    found, alike = apart(ours, theirs), straight(ours, theirs)
    if found is None:
        return f"nothing was drafted by one of the engines: {case['drafted']} and {case['peer_drafted']} tokens"
    case |= {"apart": [found.low, found.difference, found.high], "verdict": found.verdict}
    if alike is not None:
        case |= {"without_loops": [alike.low, alike.difference, alike.high]}
    keep(args.results, case, "accepted_share", found.ours, args.peer, found.theirs)
    print(f"{case['answers']} answers: {found.words}" + (f"; without loops {alike.words}" if alike else ""), flush=True)
    return None if found.verdict == "within" else f"{found.words}, against {args.peer}"


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
    parser.add_argument("--brief", type=int, default=0, help=f"greedy answers of {BRIEF_TOKENS} tokens (default: none)")
    parser.add_argument("--sampled", type=int, default=0, help="sampled answers (default: none)")
    parser.add_argument("--sampled-tokens", type=int, default=1000, help="of each (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="prompt (default: %(default)s tokens)")
    parser.add_argument("--at-once", action="store_true", help="side by side, with drafts alone and no speed")
    parser.add_argument("--seconds", type=float, default=7200, help="end engines that have not answered by then")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of drafts.jsonl")
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    end_orderly()
    (run if args.backend else orchestrate)(args)


if __name__ == "__main__":
    main()
