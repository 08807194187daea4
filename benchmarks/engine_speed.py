"""Speed inside vLLM: the shape of Llama-3.1-8B with dummy weights, LEXICO against vLLM's own backends, on one GPU.

    python benchmarks/engine_speed.py                              # all but `starved`
    python benchmarks/engine_speed.py --measure ttft steady --engines LEXICO-15
    python benchmarks/engine_speed.py --measure starved

Engines run one after another, each in a process of its own with nothing beside it; `engine_loads.py` says how times are
taken. Measures:

ttft     One prompt of 8,192 tokens: time to the first token over FLASH_ATTN's (`ttft_ratio`).
prefill  One prompt of 32,768 tokens in chunks of 8,192, coding aside: the same ratio (`prefill_ratio`) for an engine
         whose coding does nothing (`uncoded.py`).
steady   64 sequences of 8k context: latency between tokens and `decode_tokens_per_second`; `coding_share`, the
         part of a mean step that the engine without coding does not need. Once with all sequences at the same
         position (`aligned`), once with positions spread at random (`spread`).
decode   8 sequences of 32k context: `decode_tokens_per_second` against FLASH_ATTN and its fp8 cache.
starved  64 requests of 32k tokens that bf16 cannot hold together, in two turns, 128 tokens of answer each:
         `output_tokens_per_second` against both. 64 such prompts take minutes to compute, so the model has 8 of its 32
         layers and the cache a quarter of the memory that a card of 80 GB leaves beside the whole model, which keeps
         layers, pages and how many requests fit as they are. In turn 1 all prompts are cold and computing them is
         nearly all of the time, whatever the cache. In turn 2 the prompts go on from turn 1 and prefix caching,
         which all backends have, saves what the cache still holds.

Rows go to benchmarks/results/engine.jsonl. Without --compile the model's other layers run as they are, in CUDA graphs
for decode and eagerly in prefill, for all backends alike: that starts in a third of the time.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_loads as loads
from lexico_kernels import CodeLayout
from record import RESULTS, record
from shapes import LLAMA_3_1_8B, write_model, write_random_dictionary

ANSWER = "engine_speed="
FAST_START = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}
STARVED_LAYERS = 8
# 0.9 of 80 GB less 16 GB of weights and what a step needs, for 32 layers.
CACHE_BYTES = 54 << 30
ENGINES = ("FLASH_ATTN", "fp8", "LEXICO-15", "LEXICO-7", "LEXICO-15-uncoded")
MEASURES = {  # and the engines that it needs
    "ttft": ("FLASH_ATTN", "LEXICO-15", "LEXICO-7"),
    "prefill": ("FLASH_ATTN", "LEXICO-15-uncoded"),
    "steady": ("LEXICO-15", "LEXICO-15-uncoded"),
    "decode": ("FLASH_ATTN", "fp8", "LEXICO-15", "LEXICO-7"),
    "starved": ("FLASH_ATTN", "fp8", "LEXICO-15"),
}
Results = dict[str, dict[str, Any]]  # of each engine, of each measure


def engine_settings(name: str, peer: str, dictionary: Path) -> dict[str, Any]:
    """What `LLM` is given for an engine of `ENGINES`."""
    if not name.startswith("LEXICO"):
        return {"attention_backend": peer} | ({"kv_cache_dtype": "fp8"} if name == "fp8" else {})
    lexico = {"dictionary": str(dictionary), "sparsity": int(name.split("-")[1])}
    settings: dict[str, Any] = {"attention_backend": "LEXICO", "additional_config": {"lexico": lexico}}
    return settings | ({"worker_extension_cls": "uncoded.Uncoded"} if name.endswith("uncoded") else {})


def spreads(count: int, step_tokens: int) -> dict[str, list[int]]:
    """New tokens of each request, which put all at one position or each anywhere in most of a block.

    step_tokens: most tokens of a step, which takes the new tokens of 64 requests.
    """
    most = max(step_tokens // 64 * 3 // 4, 2)
    return {"aligned": [most // 2] * count, "spread": [random.Random(i).randrange(1, most) for i in range(count)]}


def run_measure(measure: str, driver: loads.Driver, shrink: int, steps: int) -> dict[str, Any]:
    """One measure in the engine of this process."""
    positions = functools.partial(spreads, step_tokens=8192 // shrink)
    long, short = 32768 // shrink, 8192 // shrink
    by_name: dict[str, Callable[[], dict[str, Any]]] = {
        "ttft": lambda: loads.first_token(driver, short),
        "prefill": lambda: loads.first_token(driver, long, repeats=3),
        "steady": lambda: loads.decode_after_fill(driver, 64, short, steps, positions(64)),
        "decode": lambda: loads.decode_after_fill(driver, 8, long, steps, {"spread": positions(8)["spread"]}),
        "starved": lambda: loads.starved(driver, 64, long, 64, 128 // min(shrink, 16)),
    }
    return by_name[measure]()


def serve(settings: dict[str, Any], measures: list[str], shrink: int, steps: int) -> None:
    """Start an engine and print each measure's result."""
    from vllm import LLM

    driver = loads.Driver(LLM(**settings))
    for measure in measures:
        print(f"{ANSWER}{json.dumps([measure, run_measure(measure, driver, shrink, steps)])}", flush=True)


def measure_engine(
    settings: dict[str, Any], measures: list[str], options: argparse.Namespace, log: Path
) -> dict[str, Any]:
    """Run an engine in a process of its own; what it measured before it failed or ran out of time counts."""
    command = [sys.executable, __file__, "--serve", json.dumps(settings), "--measure", *measures]
    environment = dict(os.environ)
    # An engine's worker imports `uncoded` by its name.
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment.get("PYTHONPATH", "")])
    with log.open("w") as file:
        try:
            process = subprocess.run(
                [*command, "--shrink", str(options.shrink), "--steps", str(options.steps)],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=environment,
                timeout=options.engine_seconds,
            )
            printed, failed = process.stdout, process.returncode != 0
        except subprocess.TimeoutExpired as error:
            printed, failed = (error.stdout or b"").decode(), True
    if failed:
        print(f"engine_speed: {log.stem} did not finish; the end of {log}:\n{log.read_text()[-2500:]}", file=sys.stderr)
    lines = [line.removeprefix(ANSWER) for line in printed.splitlines() if line.startswith(ANSWER)]
    return dict(json.loads(line) for line in lines)


def rows(results: Results, case: dict[str, Any], shrink: int) -> list[tuple[dict[str, Any], str, float, Any, Any]]:
    """(case, metric, value, peer, peer's value) of everything that was measured."""
    out: list[tuple[dict[str, Any], str, float, Any, Any]] = []
    peers = {peer: results.get(peer, {}) for peer in ("FLASH_ATTN", "fp8")}
    uncoded = results.get("LEXICO-15-uncoded", {})
    for engine, measured in results.items():
        own = case | ({"bytes_percent": bytes_percent(engine)} if engine.startswith("LEXICO") else {"backend": engine})
        if engine.startswith("LEXICO"):
            for measure, metric, tokens in (("ttft", "ttft_ratio", 8192), ("prefill", "prefill_ratio", 32768)):
                if measure in measured and measure in peers["FLASH_ATTN"]:
                    ours, theirs = measured[measure]["seconds"], peers["FLASH_ATTN"][measure]["seconds"]
                    seconds = {"prompt_tokens": tokens // shrink, "seconds": ours, "peer_seconds": theirs}
                    seconds |= {"coding": not engine.endswith("uncoded")}
                    out.append((own | seconds, metric, ours / theirs, "FLASH_ATTN", 1.0))
        if engine.endswith("uncoded"):
            continue
        for starts, numbers in measured.get("steady", {}).items():
            if isinstance(numbers, dict):
                at = own | {"sequences": 64, "context": 8192 // shrink, "starts": starts, **numbers}
                out.append((at, "inter_token_p99_over_median", numbers["p99_ms"] / numbers["median_ms"], None, None))
                out.append((at, "decode_tokens_per_second", numbers["tokens_per_second"], None, None))
                if without := uncoded.get("steady", {}).get(starts):
                    share = 1 - without["mean_ms"] / numbers["mean_ms"]
                    out.append((at | {"uncoded_mean_ms": without["mean_ms"]}, "coding_share", share, None, None))
        for peer, theirs in peers.items():
            if peer == engine:
                continue
            if "decode" in measured and "decode" in theirs:
                numbers, other = measured["decode"]["spread"], theirs["decode"]["spread"]
                at = own | {"sequences": 8, "context": 32768 // shrink, "median_ms": numbers["median_ms"]}
                pair = numbers["tokens_per_second"], peer, other["tokens_per_second"]
                out.append((at, "decode_tokens_per_second", *pair))
            for turn, numbers in measured.get("starved", {}).items():
                if other := theirs.get("starved", {}).get(turn):
                    at = own | {"load": "starved", "turn": int(turn), "requests": 64, "seconds": numbers["seconds"]}
                    at |= {"prompt_tokens": 32768 // shrink}
                    pair = numbers["tokens_per_second"], peer, other["tokens_per_second"]
                    out.append((at, "output_tokens_per_second", *pair))
    return out


def bytes_percent(engine: str) -> float:
    """Coded bytes in percent of raw ones."""
    sparsity = int(engine.split("-")[1])
    return 100 * CodeLayout(LLAMA_3_1_8B["head_dim"], LLAMA_3_1_8B["num_key_value_heads"], sparsity, sparsity).ratio


def main() -> None:
    """Measure each engine, then write the rows that their results allow."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=[m for m in MEASURES if m != "starved"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="in this order")
    parser.add_argument("--peer", default="FLASH_ATTN", help="backend in the place of FLASH_ATTN")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the rest of the model")
    parser.add_argument("--settings", type=json.loads, default={}, help="more settings of vLLM's LLM(), as JSON")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try this out")
    parser.add_argument("--shape", type=json.loads, default={}, help="other values of config.json, to try this out")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths by this, to try this out")
    parser.add_argument("--steps", type=int, default=256, help="of decode; every block's end is among 128")
    parser.add_argument("--engine-seconds", type=float, default=600, help="most that an engine may take")
    parser.add_argument("--logs", type=Path, default=Path("engine_speed_logs"), help="folder for the engines' messages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of engine.jsonl")
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve(args.serve, args.measure, args.shrink, args.steps)
    args.logs.mkdir(parents=True, exist_ok=True)
    starved = "starved" in args.measure
    if starved and len(args.measure) > 1:
        parser.error("`starved` has a model and a cache of its own: give it alone")
    layers = args.layers or (STARVED_LAYERS if starved else None)
    common = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 32768 // args.shrink + 1024,
        "max_num_batched_tokens": max(8192 // args.shrink, 64),
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.9,
        "disable_log_stats": True,
    }
    if not args.compile:
        common["compilation_config"] = FAST_START
    if starved:
        common["kv_cache_memory_bytes"] = CACHE_BYTES * (layers or 1) // LLAMA_3_1_8B["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "llama-3.1-8b-shape", LLAMA_3_1_8B | args.shape, layers)
        common = {"model": str(model)} | common | args.settings
        dictionary = write_random_dictionary(model)
        results: Results = {}
        for name in args.engines:
            if measures := [measure for measure in args.measure if name in MEASURES[measure]]:
                settings = common | engine_settings(name, args.peer, dictionary)
                log = args.logs / f"{name}{'-starved' if starved else ''}.log"
                results[name] = measure_engine(settings, measures, args, log)
                print(f"{name}: {json.dumps(results[name])}", flush=True)
    case = {"model": "Llama-3.1-8B shape", "layers": layers or LLAMA_3_1_8B["num_hidden_layers"]}
    case |= {"compiled": args.compile, **args.settings}
    for at, metric, value, peer, peer_value in rows(results, case, args.shrink):
        row = record("engine", at, metric, value, peer, peer_value, folder=args.results)
        words = " ".join(f"{key} {at[key]}" for key in ("bytes_percent", "backend", "starts", "turn") if key in at)
        print(f"{metric} ({words}): {value:.4g}" + (f", {row['ratio']:.3f} of {peer}" if peer else ""), flush=True)
    return None


if __name__ == "__main__":
    main()
