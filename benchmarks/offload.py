"""A cache that comes back from host memory: LEXICO against bf16 with the same connector, on one GPU.

    python benchmarks/offload.py                                  # some 5 minutes on one GPU
    python benchmarks/offload.py --connectors OffloadingConnector --engines FLASH_ATTN LEXICO-15 --measures prompt

The shape of Llama-3.1-8B with dummy weights. Engines of one connector start together, so that a start's minute is spent
once, and measure one after another. Measures:

prompt         One prompt of 32,768 tokens at a time: computed, forgotten by the GPU's prefix cache, asked again. All
               whole blocks then have to come from host memory, as vLLM's own count says, or the run fails.
conversations  64 conversations of 32,768 tokens whose cache does not fit the GPU even in codes, in two turns, all sent
               at once. The model has 4 of its 32 layers, and the GPU's cache and host memory an eighth of --gpu-gib and
               --host-gib, so that as many conversations fit as with all layers. bf16 runs again with --peer-gib of host
               memory, in which its 64 conversations fit too.

Rows go to benchmarks/results/offload.jsonl:

ttft_from_host_ms     time to the first token, against FLASH_ATTN with the same connector, and against computing the
                      prompt again in the same engine (peer "computed").
load_ms               what vLLM says that the copies of one prompt took; OffloadingConnector alone says it.
host_bytes_per_token  bytes that a prompt's blocks take in host memory, per token, sinks with them, and
tokens_in_64_gib      how many tokens 64 GiB of it hold, both against FLASH_ATTN.
turn_seconds          of all conversations, to the last token, for each turn.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import engine_speed
from bench import engine_loads as loads
from bench.engine_process import EngineProcess, Run, answer
from bench.record import RESULTS, record
from bench.shapes import LLAMA_3_1_8B, write_model, write_random_dictionary
from bench.terminated import end_orderly

CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector")
ENGINES = ("FLASH_ATTN", "LEXICO-15", "LEXICO-7")
MEASURES = ("prompt", "conversations")
TALKING = ("FLASH_ATTN", "LEXICO-15")  # engines that have conversations, with the first connector alone
COUNTS = {  # what vLLM counts in all, by what it is called here
    "external_tokens": "vllm:external_prefix_cache_hits",
    "local_tokens": "vllm:prefix_cache_hits",
    "load_bytes": "vllm:kv_offload_load_bytes",
    "load_seconds": "vllm:kv_offload_load_time",
    "store_bytes": "vllm:kv_offload_store_bytes",
}
HELD_BYTES = 64 << 30  # of the row `tokens_in_64_gib`
STORED_SECONDS = 1.0  # after a prompt, until all of it is in host memory
PROMPT_TOKENS = 32768
NEW_TOKENS, ANSWER_TOKENS = 128, 16  # of a conversation's turn
FEW_LAYERS = 4
POOL_BYTES = 6 << 30  # of an engine that is asked single prompts: one of bf16 takes 4 GiB
HOST_BYTES = 9 << 30  # two of bf16's prompts
Found = dict[str, Any]
Row = tuple[str, float, str | None, float | None]  # metric, value, peer and the peer's value


class Case(NamedTuple):
    """An engine and what it measures.

    host_gib: of all layers, which conversations are asked with; 0 for prompts.
    """

    connector: str
    engine: str
    measure: str
    host_gib: float = 0

    @property
    def name(self) -> str:
        return f"{self.connector} {self.engine} {self.host_gib:.0f}"


def cases(options: argparse.Namespace, connector: str) -> list[Case]:
    """What is measured with a connector, in this order; what others are compared with comes first."""
    found = [Case(connector, engine, "prompt") for engine in options.engines if "prompt" in options.measures]
    if "conversations" not in options.measures or connector != options.connectors[0]:
        return found
    if "FLASH_ATTN" in options.engines:
        found += [Case(connector, "FLASH_ATTN", "conversations", gib) for gib in (options.host_gib, options.peer_gib)]
    talking = [engine for engine in options.engines if engine in TALKING[1:]]
    return found + [Case(connector, engine, "conversations", options.host_gib) for engine in talking]


def counts() -> dict[str, float]:
    """What vLLM has counted so far, by our names; those that the connector does not count are 0.

    `get_metrics` would round seconds to whole ones.
    """
    from prometheus_client import REGISTRY

    totals = dict.fromkeys(COUNTS, 0.0)
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    for name, called in COUNTS.items():
        totals[name] += sum(sample.value for sample in samples if sample.name == f"{called}_total")
    return totals


def through_host(driver: loads.Driver, length: int, repeats: int) -> Found:
    """Times of prompts that are computed, and of the same from host memory; medians, after a round that does not count.

    Raises:
        ValueError: not all whole blocks of a prompt came from host memory.
    """
    rounds = []
    for _ in range(repeats + 1):
        prompt, before = driver.prompts([length]), counts()
        computed = driver.run(prompt, 1).seconds
        time.sleep(STORED_SECONDS)
        driver.run(driver.prompts([4]), 2)  # stores are handed out, and reported, with steps
        time.sleep(STORED_SECONDS)
        driver.run(driver.prompts([4]), 2)
        stored = counts()
        if not driver.engine.reset_prefix_cache():
            raise ValueError("the prefix cache is still in use; wait longer before it is forgotten")
        loaded = driver.run(prompt, 1).seconds
        driver.run(driver.prompts([4]), 2)
        after = counts()
        found = {name: after[name] - stored[name] for name in COUNTS} | {"computed": computed, "loaded": loaded}
        found["store_bytes"] = stored["store_bytes"] - before["store_bytes"]
        if found["external_tokens"] < (length - 1) // loads.BLOCK_TOKENS * loads.BLOCK_TOKENS:
            raise ValueError(f"of {length} tokens {found['external_tokens']:.0f} came from host memory")
        rounds.append(found)
        print({name: round(value, 4) for name, value in found.items()}, file=sys.stderr, flush=True)
    return {name: statistics.median(one[name] for one in rounds[1:]) for name in rounds[0]} | {"tokens": length}


def conversations(driver: loads.Driver, count: int, length: int) -> Found:
    """Seconds of two turns of all conversations, and where the cached tokens of the second came from."""
    prompts, found = driver.prompts([length] * count), {}
    driver.run(driver.prompts([length]), 2)  # kernels are compiled
    for turn in (1, 2):
        before, timeline = counts(), driver.run(prompts, ANSWER_TOKENS)
        firsts = [first - timeline.started for first in timeline.first.values()]
        come = {name: value - before[name] for name, value in counts().items()}
        found[str(turn)] = come | {"seconds": timeline.seconds, "mean_first_seconds": statistics.mean(firsts)}
        prompts = [old + new for old, new in zip(prompts, driver.prompts([NEW_TOKENS] * len(prompts)), strict=True)]
        time.sleep(STORED_SECONDS)
    return found


def serve(options: argparse.Namespace) -> None:
    """Start the engine that standard input tells, say so, and measure once that is closed."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    settings = json.loads(sys.stdin.readline())
    if settings.pop("on_the_host"):
        from bench.host_memory import copy_on_the_host

        copy_on_the_host()
    settings["kv_transfer_config"] = KVTransferConfig(**settings["kv_transfer_config"])
    driver = loads.Driver(LLM(**settings))
    answer("started", dict)
    sys.stdin.read()
    (measure,) = options.measure
    length = PROMPT_TOKENS // options.shrink
    measures = {
        "prompt": functools.partial(through_host, driver, length, options.steps),
        "conversations": functools.partial(conversations, driver, options.turns, length),
    }
    answer(measure, measures[measure])


def prompt_rows(found: Found, bf16: Found | None) -> list[Row]:
    """What an engine has measured of single prompts; bf16: what FLASH_ATTN has, None for itself."""
    peer = None if bf16 is None else "FLASH_ATTN"
    per_token = found["store_bytes"] / found["tokens"]
    out: list[Row] = [("ttft_from_host_ms", 1e3 * found["loaded"], "computed", 1e3 * found["computed"])]
    if bf16 is not None:
        out.append(("ttft_from_host_ms", 1e3 * found["loaded"], peer, 1e3 * bf16["loaded"]))
    if not found["store_bytes"]:  # this connector does not count bytes
        return out
    theirs = None if bf16 is None else bf16["store_bytes"] / bf16["tokens"]
    held = None if theirs is None else HELD_BYTES / theirs
    load_ms = None if bf16 is None else 1e3 * bf16["load_seconds"]
    out.append(("load_ms", 1e3 * found["load_seconds"], peer, load_ms))
    out.append(("host_bytes_per_token", per_token, peer, theirs))
    out.append(("tokens_in_64_gib", HELD_BYTES / per_token, peer, held))
    return out


def settings_of(case: Case, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """What a case's `LLM` is given."""
    few = case.measure == "conversations"
    layers = options.layers or (FEW_LAYERS if few else LLAMA_3_1_8B["num_hidden_layers"])
    share = FEW_LAYERS / LLAMA_3_1_8B["num_hidden_layers"] * (1 << 30) / options.shrink
    host, pool = (
        (case.host_gib * share, options.gpu_gib * share)
        if few
        else (one / options.shrink for one in (HOST_BYTES, POOL_BYTES))
    )
    model = write_model(folder / f"llama-3.1-8b-shape-{layers}", LLAMA_3_1_8B | options.shape, layers)
    dictionary = model / "random.safetensors"
    if not dictionary.exists():
        write_random_dictionary(model)
    transfer: dict[str, Any] = {"kv_connector": case.connector, "kv_role": "kv_both"}
    transfer["kv_connector_extra_config"] = {"cpu_bytes_to_use": int(host)}
    settings = {"model": str(model), "on_the_host": options.peer == "CPU_ATTN", "kv_transfer_config": transfer}
    # Beside others vLLM checks this share of the memory and profiles nothing.
    settings |= engine_speed.common_settings(options) | {"gpu_memory_utilization": 0.05, "disable_log_stats": False}
    settings |= engine_speed.engine_settings(case.engine, options.peer, dictionary)
    return settings | {"kv_cache_memory_bytes": int(pool)} | options.settings


def keep(case: Case, found: Found, kept: dict[Case, Found], options: argparse.Namespace) -> None:
    """Write a case's rows; kept: what was found before."""
    few = case.measure == "conversations"
    layers = options.layers or (FEW_LAYERS if few else LLAMA_3_1_8B["num_hidden_layers"])
    at = {"model": "Llama-3.1-8B shape", "layers": layers, "connector": case.connector, "backend": case.engine}
    at |= {"prompt_tokens": PROMPT_TOKENS // options.shrink}
    rows: list[tuple[dict[str, Any], Row]] = []
    if not few:
        bf16 = None if case.engine == "FLASH_ATTN" else kept.get(Case(case.connector, "FLASH_ATTN", "prompt"))
        rows = [(at | {"repeats": options.steps, **found}, row) for row in prompt_rows(found, bf16)]
    for turn in ("1", "2") if few else ():
        here = at | {"conversations": options.turns, "turn": int(turn), "gpu_gib": options.gpu_gib, **found[turn]}
        here |= {"host_gib": case.host_gib, "answer_tokens": ANSWER_TOKENS, "new_tokens": NEW_TOKENS}
        peers = [one for one in kept if one[1:3] == ("FLASH_ATTN", "conversations") and case.engine != "FLASH_ATTN"]
        pairs: list[tuple[Any, Any]] = [
            (f"FLASH_ATTN, {one.host_gib:g} GiB", kept[one][turn]["seconds"]) for one in peers
        ]
        rows += [(here, ("turn_seconds", found[turn]["seconds"], *pair)) for pair in pairs or [(None, None)]]
    for row_case, row in rows:
        written = record("offload", row_case, *row, folder=options.results)
        beside = f", {written['ratio']:.3f} of {row[2]}" if written["ratio"] else ""
        words = f"{case.name}{' turn ' + str(row_case['turn']) if few else ''}"
        print(f"{row[0]} ({words}): {row[1]:.5g}{beside}", flush=True)


def measure_all(options: argparse.Namespace, folder: Path) -> int:
    """Start the engines of each connector together and have them measure in turn; returns how many failed."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if options.peer == "CPU_ATTN" else {}
    failed, kept, end = 0, {}, time.monotonic() + options.seconds
    for connector in options.connectors:
        processes = []
        try:
            for case in cases(options, connector):
                run, settings = Run(case.name, (case.measure,)), settings_of(case, options, folder)
                processes.append((case, EngineProcess(run, settings, options, __file__, environment)))
                processes[-1][1].begin()
            for case, process in processes:
                began = next(process.answers(min(options.engine_seconds, end - time.monotonic())), None)
                print(f"{case.name} {case.measure}: {'did not start' if began is None else 'started'}", flush=True)
            for case, process in processes:
                seconds = min(options.engine_seconds, end - time.monotonic())
                results = [result for _, result, _ in process.results(seconds)]
                if results:
                    kept[case] = results[0]
                    keep(case, results[0], kept, options)
                    continue
                process.complain()
                failed += 1
        finally:
            for _, process in processes:
                process.stop()
    return failed


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connectors", nargs="+", choices=CONNECTORS, default=list(CONNECTORS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="in this order")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--gpu-gib", type=float, default=16, help="the GPU's cache (default: %(default)s)")
    parser.add_argument("--host-gib", type=float, default=64, help="of conversations (default: %(default)s)")
    parser.add_argument("--peer-gib", type=float, default=272, help="the same, once more for bf16 (%(default)s)")
    parser.add_argument("--peer", default="FLASH_ATTN", help="backend in the place of FLASH_ATTN")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the rest of the model")
    parser.add_argument("--settings", type=json.loads, default={}, help="more settings of vLLM's LLM(), as JSON")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try this out")
    parser.add_argument("--shape", type=json.loads, default={}, help="other values of config.json, to try this out")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths by this, to try this out")
    parser.add_argument("--steps", "--repeats", type=int, default=2, help="prompts per engine, after one more")
    parser.add_argument("--engine-seconds", type=float, default=600, help="most that an engine may take")
    parser.add_argument("--seconds", type=float, default=3600, help="most that all may take")
    parser.add_argument("--logs", type=Path, default=Path("offload_logs"), help="folder for the engines' messages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of offload.jsonl")
    parser.add_argument("--answer-tokens", type=int, default=NEW_TOKENS + 2 * ANSWER_TOKENS, help=argparse.SUPPRESS)
    parser.add_argument("--turns", "--conversations", type=int, default=64, help="at once (default: %(default)s)")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    end_orderly()
    options.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(1 if measure_all(options, Path(folder)) else 0)


if __name__ == "__main__":
    main()
