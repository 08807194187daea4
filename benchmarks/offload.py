"""A prompt whose cache comes back from host memory: LEXICO against bf16 with the same connector, on one GPU.

    python benchmarks/offload.py                                  # some 6 minutes on one GPU
    python benchmarks/offload.py --connectors OffloadingConnector --engines FLASH_ATTN LEXICO-15

The shape of Llama-3.1-8B with dummy weights, one prompt of 32,768 tokens at a time. Each engine computes prompts it has
never seen, forgets the GPU's prefix cache, and is asked the same again: all whole blocks then have to come from host
memory, as vLLM's own count of tokens from a connector says, or the run fails. Rows go to
benchmarks/results/offload.jsonl:

ttft_from_host_ms   time to the first token, against FLASH_ATTN with the same connector, and against computing the
                    prompt again in the same engine (peer "computed").
load_ms             what vLLM says that the copies of one prompt took; OffloadingConnector alone says it.
host_bytes_per_token  bytes that a prompt's blocks take in host memory, per token, sinks with them, and
tokens_in_64_gib    how many tokens 64 GiB of it hold, both against FLASH_ATTN.
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

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import engine_speed
from bench import engine_loads as loads
from bench.record import RESULTS, record
from bench.shapes import LLAMA_3_1_8B, write_model, write_random_dictionary

CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector")
ENGINES = ("FLASH_ATTN", "LEXICO-15", "LEXICO-7")
MEASURE = "offload"
COUNTS = {  # what vLLM counts in all, by what it is called here
    "external_tokens": "vllm:external_prefix_cache_hits",
    "load_bytes": "vllm:kv_offload_load_bytes",
    "load_seconds": "vllm:kv_offload_load_time",
    "store_bytes": "vllm:kv_offload_store_bytes",
}
HELD_BYTES = 64 << 30  # of the row `tokens_in_64_gib`
STORED_SECONDS = 2.0  # after a prompt, until all of it is in host memory
Found = dict[str, float]
Row = tuple[str, float, str | None, float | None]  # metric, value, peer and the peer's value


def counts() -> Found:
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
    return {name: statistics.median(one[name] for one in rounds[1:]) for name in rounds[0]} | {"tokens": length}


def serve(options: argparse.Namespace) -> None:
    """Wait for an engine's settings on standard input, start it and print the result, null if it failed."""
    settings = json.loads(sys.stdin.readline())
    from vllm import LLM
    from vllm.config import KVTransferConfig

    if settings.pop("on_the_host"):
        from bench.host_memory import copy_on_the_host

        copy_on_the_host()
    settings["kv_transfer_config"] = KVTransferConfig(**settings["kv_transfer_config"])
    driver = loads.Driver(LLM(**settings))
    engine_speed.answer(MEASURE, functools.partial(through_host, driver, 32768 // options.shrink, options.steps))


def rows(found: Found, bf16: Found | None) -> list[Row]:
    """What an engine has measured; bf16: what FLASH_ATTN has, None for itself."""
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


def measure_all(options: argparse.Namespace, folder: Path) -> int:
    """Run one engine after the other; returns how many failed."""
    layers = options.layers or LLAMA_3_1_8B["num_hidden_layers"]
    model = write_model(folder / f"llama-3.1-8b-shape-{layers}", LLAMA_3_1_8B | options.shape, layers)
    dictionary, failed = write_random_dictionary(model), 0
    on_the_host = options.peer == "CPU_ATTN"
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if on_the_host else {}
    for connector in options.connectors:
        bf16: Found | None = None
        for engine in options.engines:
            transfer = {"kv_connector": connector, "kv_role": "kv_both"}
            transfer["kv_connector_extra_config"] = {"cpu_bytes_to_use": int(options.host_gib * (1 << 30))}
            settings = {"model": str(model), "on_the_host": on_the_host, "kv_transfer_config": transfer}
            settings |= engine_speed.common_settings(options) | {"disable_log_stats": False}
            settings |= engine_speed.engine_settings(engine, options.peer, dictionary) | options.settings
            run = engine_speed.Run(f"{connector} {engine}", (MEASURE,))
            process = engine_speed.EngineProcess(run, settings, options, __file__, environment)
            results = [result for _, result, _ in process.results(options.engine_seconds)]
            if not results:
                process.complain()
                failed += 1
                continue
            case = {"model": "Llama-3.1-8B shape", "layers": layers, "connector": connector, "backend": engine}
            case |= {"prompt_tokens": 32768 // options.shrink, "repeats": options.steps, **results[0]}
            for row in rows(results[0], bf16):
                kept = record("offload", case, *row, folder=options.results)
                beside = f", {kept['ratio']:.3f} of {row[2]}" if kept["ratio"] else ""
                print(f"{row[0]} ({connector}, {engine}): {row[1]:.5g}{beside}", flush=True)
            bf16 = results[0] if engine == "FLASH_ATTN" else bf16
    return failed


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--connectors", nargs="+", choices=CONNECTORS, default=list(CONNECTORS))
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="in this order")
    parser.add_argument(
        "--host-gib", type=float, default=40, help="host memory of the connector (default: %(default)s)"
    )
    parser.add_argument("--peer", default="FLASH_ATTN", help="backend in the place of FLASH_ATTN")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the rest of the model")
    parser.add_argument("--settings", type=json.loads, default={}, help="more settings of vLLM's LLM(), as JSON")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try this out")
    parser.add_argument("--shape", type=json.loads, default={}, help="other values of config.json, to try this out")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths by this, to try this out")
    parser.add_argument("--steps", "--repeats", type=int, default=3, help="prompts per engine, after one more")
    parser.add_argument("--engine-seconds", type=float, default=600, help="most that an engine may take")
    parser.add_argument("--logs", type=Path, default=Path("offload_logs"), help="folder for the engines' messages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of offload.jsonl")
    parser.add_argument("--answer-tokens", type=int, default=128, help=argparse.SUPPRESS)  # engine_speed's
    parser.add_argument("--turns", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    options.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(1 if measure_all(options, Path(folder)) else 0)


if __name__ == "__main__":
    main()
