"""Speed inside vLLM: the shape of Llama-3.1-8B with dummy weights, LEXICO against vLLM's own backends, on one GPU.

    python benchmarks/engine_speed.py --seconds 280                # as much as fits, most wanted first
    python benchmarks/engine_speed.py --measure ttft steady --engines FLASH_ATTN LEXICO-15
    python benchmarks/engine_speed.py --measure starved --resume   # beside what an earlier call has measured

Engines run one after another (`RUNS`), each in a process of its own with nothing beside it but the next one's imports
while it starts; `engine_loads.py` says how times are taken. What was measured is kept at once, in LOGS/measured.jsonl,
and rows are written as soon as all that they need is there; what fails or runs out of time costs only its own.
Measures, with the seconds that one takes beside an engine's start of some 25, for LEXICO 40 (expected, not measured):

ttft     One prompt of 8,192 tokens: time to the first token over FLASH_ATTN's (`ttft_ratio`). 4 s.
prefill  One prompt of 32,768 tokens in chunks of 8,192: the same ratio (`prefill_ratio`), and that of an engine whose
         coding does nothing (`bench/uncoded.py`). 8 s.
steady   64 sequences of 8k context: latency between tokens and `decode_tokens_per_second`; `coding_share`, the
         part of a mean step that the engine without coding does not need. Once with all sequences at the same
         position (`aligned`), once with positions spread at random (`spread`). 40 s, of which 30 to fill the cache.
decode   8 sequences of 32k context: `decode_tokens_per_second` against FLASH_ATTN and its fp8 cache. 20 s.
starved  64 requests of 32k tokens that bf16 cannot hold together, in --turns, --answer-tokens (128) of answer each:
         `output_tokens_per_second` against both. 64 such prompts take minutes to compute, so the model has 4 of its 32
         layers and the cache an eighth of the memory that a card of 80 GB leaves beside the whole model, which keeps
         layers, pages and how many requests fit as they are. In turn 1 all prompts are cold and, if answers are short,
         computing them is nearly all of the time, whatever the cache. In turn 2 the prompts go on from turn 1 and
         prefix caching, which all backends have, saves what the cache still holds. 25 s.

Rows go to benchmarks/results/engine.jsonl. Without --compile the model's other layers run as they are, in CUDA graphs
for decode and eagerly in prefill, for all backends alike: that starts in a third of the time.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench import engine_loads as loads
from bench.engine_process import EngineProcess, Run, answer
from bench.record import RESULTS, record
from bench.shapes import LLAMA_3_1_8B, write_model, write_random_dictionary
from bench.terminated import end_orderly
from lexico_kernels import CodeLayout

FAST_START = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}
STARVED_LAYERS = 4
# 0.9 of 80 GB less 16 GB of weights and what a step needs, for 32 layers.
CACHE_BYTES = 54 << 30
ENGINES = ("FLASH_ATTN", "fp8", "LEXICO-15", "LEXICO-7", "LEXICO-15-uncoded")
MEASURES = ("ttft", "prefill", "steady", "decode", "starved")
LEAST_SECONDS = 30  # left, to start another engine


RUNS = (  # most wanted first, but for what they are compared with
    Run("FLASH_ATTN", ("ttft", "decode", "prefill")),
    Run("LEXICO-15", ("ttft", "prefill", "decode", "steady")),
    Run("LEXICO-15-uncoded", ("steady", "prefill")),
    Run("FLASH_ATTN", ("starved",)),
    Run("LEXICO-15", ("starved",)),
    Run("fp8", ("starved",)),
    Run("LEXICO-7", ("ttft", "prefill", "decode")),
    Run("fp8", ("decode",)),
)
Results = dict[str, dict[str, Any]]  # of each engine, of each measure
Row = tuple[dict[str, Any], str, float, str | None, float | None]  # case, metric, value, peer, peer's value


def engine_settings(name: str, peer: str, dictionary: Path, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What `LLM` is given for an engine of `ENGINES`; `more`: settings of LEXICO."""
    if not name.startswith("LEXICO"):
        return {"attention_backend": peer} | ({"kv_cache_dtype": "fp8"} if name == "fp8" else {})
    lexico = {"dictionary": str(dictionary), "sparsity": int(name.split("-")[1]), **(more or {})}
    settings: dict[str, Any] = {"attention_backend": "LEXICO", "additional_config": {"lexico": lexico}}
    return settings | ({"worker_extension_cls": "bench.uncoded.Uncoded"} if name.endswith("uncoded") else {})


def spreads(count: int, step_tokens: int) -> dict[str, list[int]]:
    """New tokens of each request, which put all at one position or each anywhere in most of a block.

    step_tokens: most tokens of a step, which takes the new tokens of 64 requests.
    """
    most = max(step_tokens // 64 * 3 // 4, 2)
    return {"aligned": [most // 2] * count, "spread": [random.Random(i).randrange(1, most) for i in range(count)]}


def run_measure(measure: str, driver: loads.Driver, options: argparse.Namespace) -> dict[str, Any]:
    """One measure in the engine of this process."""
    shrink, steps = options.shrink, options.steps
    positions = functools.partial(spreads, step_tokens=8192 // shrink)
    long, short = 32768 // shrink, 8192 // shrink
    by_name: dict[str, Callable[[], dict[str, Any]]] = {
        "ttft": lambda: loads.first_token(driver, short),
        "prefill": lambda: loads.first_token(driver, long, repeats=3),
        "steady": lambda: loads.decode_after_fill(driver, 64, short, steps, positions(64)),
        "decode": lambda: loads.decode_after_fill(driver, 8, long, steps, {"spread": positions(8)["spread"]}),
        "starved": lambda: loads.starved(driver, 64, long, 64, options.answer_tokens // min(shrink, 16), options.turns),
    }
    return by_name[measure]()


def serve(options: argparse.Namespace) -> None:
    """Wait for an engine's settings on standard input, start it and print each measure's result, null if it failed."""
    from vllm import LLM

    driver = loads.Driver(LLM(**json.loads(sys.stdin.readline())))
    gc.collect()
    gc.freeze()  # as vLLM's server does: what the imports made is not looked through again while tokens are timed
    for measure in options.measure:
        answer(measure, functools.partial(run_measure, measure, driver, options))


class Measured:
    """What engines have measured, in a file too, and the rows that follow from it."""

    def __init__(self, options: argparse.Namespace, case: dict[str, Any], starved_layers: int) -> None:
        self._options, self._case, self._starved_layers = options, case, starved_layers
        self._file = options.logs / "measured.jsonl"
        self._results: Results = {}
        if options.resume and self._file.exists():
            for line in self._file.read_text().splitlines():
                engine, measure, result = json.loads(line)
                self._results.setdefault(engine, {})[measure] = result
        else:
            self._file.write_text("")
        self._written = {json.dumps(row) for row in self._rows()}

    def _rows(self) -> list[Row]:
        return rows(self._results, self._case, self._options.shrink, self._starved_layers)

    def add(self, engine: str, measure: str, result: dict[str, Any]) -> None:
        """Keep a result and write the rows that it completes."""
        self._results.setdefault(engine, {})[measure] = result
        with self._file.open("a") as file:
            file.write(json.dumps([engine, measure, result]) + "\n")
        for row in self._rows():
            if (key := json.dumps(row)) not in self._written:
                self._written.add(key)
                self._write(*row)

    def _write(self, at: dict[str, Any], metric: str, value: float, peer: str | None, peer_value: float | None) -> None:
        if peer == "FLASH_ATTN":
            peer = self._options.peer
        row = record("engine", at, metric, value, peer, peer_value, folder=self._options.results)
        words = " ".join(f"{key} {at[key]}" for key in ("bytes_percent", "backend", "starts", "turn") if key in at)
        print(f"{metric} ({words}): {value:.4g}" + (f", {row['ratio']:.3f} of {peer}" if peer else ""), flush=True)


def rows(results: Results, case: dict[str, Any], shrink: int, starved_layers: int) -> list[Row]:
    """Rows of everything that was measured and has what it is compared with."""
    out: list[Row] = []
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
                other = theirs.get("starved", {}).get(turn)
                if other and other.get("answer_tokens") == numbers.get("answer_tokens"):
                    at = own | {"load": "starved", "turn": int(turn), "requests": 64, **numbers}
                    del at["tokens_per_second"]
                    at |= {"prompt_tokens": 32768 // shrink, "layers": starved_layers}
                    pair = numbers["tokens_per_second"], peer, other["tokens_per_second"]
                    out.append((at, "output_tokens_per_second", *pair))
    return out


def bytes_percent(engine: str) -> float:
    """Coded bytes in percent of raw ones."""
    sparsity = int(engine.split("-")[1])
    return 100 * CodeLayout(LLAMA_3_1_8B["head_dim"], LLAMA_3_1_8B["num_key_value_heads"], sparsity, sparsity).ratio


def planned(options: argparse.Namespace) -> list[Run]:
    """The runs that the command line leaves."""
    left = [Run(run.engine, tuple(m for m in run.measures if m in options.measure)) for run in RUNS]
    return [run for run in left if run.measures and run.engine in options.engines]


def common_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What `LLM` is given for every engine."""
    settings = {
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": 32768 // options.shrink + 1024 + options.answer_tokens,
        "max_num_batched_tokens": max(8192 // options.shrink, 64),
        "max_num_seqs": 64,
        "gpu_memory_utilization": 0.9,
        "disable_log_stats": True,
    }
    if not options.compile:
        settings["compilation_config"] = FAST_START
    return settings | options.settings


def measure_all(options: argparse.Namespace, folder: Path) -> None:
    """Run one engine after the other; the next one's process imports while an engine starts."""
    all_layers = LLAMA_3_1_8B["num_hidden_layers"]
    layers, starved_layers = (options.layers or count for count in (all_layers, STARVED_LAYERS))
    case = {
        "model": "Llama-3.1-8B shape",
        "layers": layers,
        "compiled": options.compile,
        **options.settings,
        **options.lexico,
    }
    measured = Measured(options, case, starved_layers)

    @functools.cache
    def model_of(count: int) -> tuple[Path, Path]:
        model = write_model(folder / f"llama-3.1-8b-shape-{count}", LLAMA_3_1_8B | options.shape, count)
        return model, write_random_dictionary(model)

    def process(run: Run) -> EngineProcess:
        starved = "starved" in run.measures
        model, dictionary = model_of(starved_layers if starved else layers)
        settings = {"model": str(model)} | common_settings(options)
        if starved:
            settings["kv_cache_memory_bytes"] = CACHE_BYTES * starved_layers // all_layers // options.shrink
        return EngineProcess(
            run, settings | engine_settings(run.engine, options.peer, dictionary, options.lexico), options, __file__
        )

    deadline = time.monotonic() + options.seconds
    runs = planned(options)
    processes: list[EngineProcess] = []
    try:
        for i, run in enumerate(runs):
            began = time.monotonic()
            left = deadline - began
            if left < LEAST_SECONDS:
                skipped = ", ".join(f"{run.engine} {' '.join(run.measures)}" for run in runs[i:])
                print(f"engine_speed: out of time for {skipped}", file=sys.stderr)
                return
            processes += map(process, runs[len(processes) : i + 2])
            _measure_engine(processes[i], min(options.engine_seconds, left), measured)
            print(f"{run.engine}: {time.monotonic() - began:.1f} s", flush=True)
    finally:
        for each in processes:
            each.stop()


def _measure_engine(engine: EngineProcess, seconds: float, measured: Measured) -> None:
    missing, began = set(engine.run.measures), time.monotonic()
    for measure, result, took in engine.results(seconds):
        missing.discard(measure)
        at = time.monotonic() - began
        print(f"{engine.run.engine} {measure}: {took:.1f} s, at {at:.1f} s: {json.dumps(result)}", flush=True)
        measured.add(engine.run.engine, measure, result)
    if missing:
        engine.complain()


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--seconds", type=float, default=3600, help="start no engine that would end later, roughly")
    parser.add_argument("--resume", action="store_true", help="compare with what an earlier call has measured too")
    parser.add_argument("--peer", default="FLASH_ATTN", help="backend in the place of FLASH_ATTN")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the rest of the model")
    parser.add_argument("--settings", type=json.loads, default={}, help="more settings of vLLM's LLM(), as JSON")
    parser.add_argument("--lexico", type=json.loads, default={}, help="more settings of LEXICO's engines, as JSON")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try this out")
    parser.add_argument("--shape", type=json.loads, default={}, help="other values of config.json, to try this out")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths by this, to try this out")
    parser.add_argument("--steps", type=int, default=144, help="of decode; every block's end is among 128")
    parser.add_argument("--answer-tokens", type=int, default=128, help="of each starved request (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=2, help="of each starved conversation (default: %(default)s)")
    parser.add_argument("--engine-seconds", type=float, default=600, help="most that an engine may take")
    parser.add_argument("--logs", type=Path, default=Path("engine_speed_logs"), help="folder for the engines' messages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of engine.jsonl")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    options.logs.mkdir(parents=True, exist_ok=True)
    end_orderly()
    with tempfile.TemporaryDirectory() as folder:
        measure_all(options, Path(folder))
    return None


if __name__ == "__main__":
    main()
