"""Drafts by a model: are as many accepted from codes as from bf16, do answers loop, and what do drafts buy?

    python benchmarks/drafts.py MODEL --drafts '{"method": "eagle3", "model": "ORG/HEAD", "num_speculative_tokens": 3}'

Prompts of real text of 100 to 8,000 tokens, answered greedily by vLLM's own backend and by LEXICO, with the same drafts
and without, in engines one after another. Printed and recorded of each: the share of drafts that were accepted, tokens
per second, and answers whose end repeats itself. Whether the cache is managed right with drafts is asked by
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

from bench.record import record

LENGTHS = (100, 300, 1000, 2000, 4000, 8000)
COUNTS = ("vllm:spec_decode_num_accepted_tokens", "vllm:spec_decode_num_draft_tokens")
ALLOWED_POINTS = 0.03  # by which the share of accepted drafts may differ from the peer's
LONGEST_PERIOD, REPEATS = 64, 4  # an end that is so many times the same passage of at most so many tokens is a loop


def loops(tokens: list[int]) -> bool:
    """Whether an answer ends with one passage over and over."""
    for period in range(1, LONGEST_PERIOD + 1):
        end = tokens[-period * REPEATS :]
        if len(end) == period * REPEATS and all(end[i] == end[i % period] for i in range(len(end))):
            return True
    return False


def run(args: argparse.Namespace) -> None:
    """Answer all prompts with one engine and write what was counted."""
    from exactness import Engine
    from vllm import SamplingParams

    settings: dict[str, Any] = {"max_model_len": max(LENGTHS) + args.answer + 64, "max_num_seqs": args.requests}
    settings |= args.settings | ({"speculative_config": args.drafts} if args.drafts else {})
    engine = Engine(args.model, args.backend, args.lexico, **settings)
    prompts = [engine.passage(number, LENGTHS[number % len(LENGTHS)]) for number in range(args.requests)]
    params = SamplingParams(temperature=0, max_tokens=args.answer, ignore_eos=True)
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    engine.llm.generate(asked[:1], params, use_tqdm=False)  # kernels are compiled
    engine.llm.reset_prefix_cache()
    before = [engine.count(name) for name in COUNTS]
    start = time.perf_counter()
    outputs = engine.llm.generate(asked, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    accepted, drafted = (engine.count(name) - old for name, old in zip(COUNTS, before, strict=True))
    said = [list(output.outputs[0].token_ids) for output in outputs]
    found = {"accepted": accepted, "drafted": drafted, "tokens_per_s": sum(map(len, said)) / seconds}
    args.out.write_text(json.dumps(found | {"loops": sum(map(loops, said))}))


def keep(case: dict[str, Any], *measured: Any) -> None:
    """Record a row and print it."""
    row = record("drafts", case, *measured)
    print(f"{row['metric']}: {row['value']:.4g}, {row['peer']}: {row['peer_value']} {case}", flush=True)


def orchestrate(args: argparse.Namespace) -> None:
    """Run the engines one after another, then compare what they counted."""
    found: dict[tuple[str, bool], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend in (args.peer, "LEXICO"):
            for drafts in (True, False):
                out = Path(folder) / f"{backend}-{drafts}.json"
                command = [sys.executable, __file__, args.model, "--backend", backend, "--out", str(out)]
                command += ["--drafts", json.dumps(args.drafts if drafts else {}), "--answer", str(args.answer)]
                command += ["--requests", str(args.requests), "--settings", json.dumps(args.settings)]
                subprocess.run([*command, "--lexico", json.dumps(args.lexico)], check=True)
                found[backend, drafts] = json.loads(out.read_text())
    case = {"model": Path(args.model).name, "method": args.drafts.get("method"), "lexico": args.lexico}
    case |= {"drafts": args.drafts.get("num_speculative_tokens"), "requests": args.requests, "answer": args.answer}
    ours, theirs = (found[backend, True] for backend in ("LEXICO", args.peer))
    shares = [one["accepted"] / max(one["drafted"], 1) for one in (ours, theirs)]
    keep(case | {"drafted": ours["drafted"]}, "accepted_share", shares[0], args.peer, shares[1])
    for drafts in (True, False):
        ours, theirs = (found[backend, drafts] for backend in ("LEXICO", args.peer))
        more = case | {"with_drafts": drafts}
        keep(more, "tokens_per_s", ours["tokens_per_s"], args.peer, theirs["tokens_per_s"])
        keep(more | {"peer_looping_answers": theirs["loops"]}, "looping_answers", ours["loops"])
    if abs(shares[0] - shares[1]) > ALLOWED_POINTS:
        sys.exit(f"{shares[0]:.3f} of the drafts are accepted instead of {shares[1]:.3f}")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--drafts", type=json.loads, required=True, metavar="JSON", help="vLLM's speculative_config")
    parser.add_argument("--lexico", type=json.loads, default={}, metavar="JSON", help="settings of LEXICO")
    parser.add_argument("--settings", type=json.loads, default={}, metavar="JSON", help="more settings of vLLM")
    parser.add_argument("--peer", default="FLASH_ATTN", help="vLLM's backend to compare with")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--answer", type=int, default=1000, help="tokens per answer")
    parser.add_argument("--backend", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    (run if args.backend else orchestrate)(args)


if __name__ == "__main__":
    main()
