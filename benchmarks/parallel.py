"""Several GPUs: does LEXICO answer alike on them, is it as fast against its peers as on one, does training gain?

    python benchmarks/parallel.py --model MODEL --dictionary FILE --seconds 540    # everything, most wanted first
    python benchmarks/parallel.py --measure speed --gpus 2 --layers 16

`--measure` takes any of these words; each row is written as soon as it can be, and what fails costs only its own.

exact  Engines with torch.compile and FULL CUDA graphs answer prompts of many lengths, with shared prefixes, from the
       prefix cache, and such as repeat themselves: the exact codec with tensor parallelism (TP) and with pipeline
       parallelism (PP) over all GPUs, the same with drafts from the prompt (ngram), and real codes, beside FLASH_ATTN.
       The exact codec must be no further from FLASH_ATTN with TP than that is from itself on one GPU; codes with TP
       no further from full precision than codes on one GPU, give or take that noise. Of a model whose KV heads the
       GPUs cannot share, a copy with added heads is made that answers the same; without --model one of random weights,
       which has experts where `--settings '{"enable_expert_parallel": true}'` shares them out (with false, each rank
       has a part of every expert).
speed  The shape of Llama-3.1-70B with --layers layers, dummy weights, TP: tokens that fit, decode tokens per second of
       8 sequences of 32k, time to the first token of 8,192, against FLASH_ATTN and fp8; and the same ratios on one GPU
       with one rank's part of the model, within 10 % of which they should be. Decode runs in CUDA graphs.
train  `vllm-lexico train` twice on one GPU, then on all: seconds, and whether the files are the same.

Engines of `exact` start several at a time and are asked one at a time; those of `speed` have their GPUs for themselves.
Rows go to benchmarks/results/parallel.jsonl. The exit status is 1 where something is missing or too far apart.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import engine_speed
import exactness
from bench import engine_loads, more_heads, parallel_exact, parallel_speed, parallel_train
from bench.engine_process import answer
from bench.letters_model import write_letters_model
from bench.parallel_jobs import Job, Kept, held, run_jobs
from bench.record import RESULTS
from bench.shapes import write_model, write_random_dictionary
from bench.terminated import end_orderly

from vllm_lexico.errors import refusal

MEASURES = ("exact", "speed", "train")
SPEED_MEASURES = ("fit", "ttft", "decode")
EXPERTS = 8  # of the model of random weights, where ranks share experts
SPEED_ENGINES = ("FLASH_ATTN", "LEXICO-15", "LEXICO-7", "fp8")
# The whole of torch.compile and CUDA graphs, of few sizes so that engines start soon.
GRAPHS = {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]}
EXACT_SETTINGS = {
    "max_model_len": 2048,
    "max_num_seqs": 32,
    "gpu_memory_utilization": 0.15,  # several engines at once
    "kv_cache_memory_bytes": 2 << 30,
    "compilation_config": GRAPHS,
}


def serve(options: argparse.Namespace) -> None:
    """Wait for an engine's settings on standard input, start it and print each measure's result, null if it failed."""
    settings = json.loads(sys.stdin.readline())
    if options.measure == ["exact"]:
        lock, lexico = Path(settings.pop("lock")), settings.pop("lexico")
        engine = exactness.Engine(settings.pop("model"), settings.pop("attention_backend"), lexico, **settings)
        with held(lock):
            answer("exact", lambda: parallel_exact.ask(engine, options.scale))
        return
    from vllm import LLM

    driver = engine_loads.Driver(LLM(**settings))
    gc.collect()
    gc.freeze()  # as engine_speed.py does
    tokens = driver.engine.vllm_config.cache_config.kv_cache_size_tokens
    answer("fit", lambda: {"tokens": tokens})
    for measure in options.measure:
        if measure != "fit":
            answer(measure, functools.partial(engine_speed.run_measure, measure, driver, options))


def gpus_of(options: argparse.Namespace) -> list[str]:
    """The GPUs to use, as CUDA_VISIBLE_DEVICES names them; processes instead where vLLM's backend is that for CPUs.

    Raises:
        ValueError: there are fewer than asked for.
    """
    if options.peer == "CPU_ATTN":
        return []
    import torch

    there = torch.cuda.device_count()
    if not 2 <= options.gpus <= there:
        allowed = f"2 to {there}" if there >= 2 else f"2 or more, and PyTorch sees {there} here"
        raise ValueError(refusal("--gpus", options.gpus, allowed, "run this on a machine with as many GPUs"))
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (shown.split(",") if shown else [str(at) for at in range(there)])[: options.gpus]


def prepare_model(options: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """The checkpoint that the ranks can share and its dictionary, of random atoms where none is given."""
    ranks = options.gpus
    if options.model:
        model = more_heads.write_model_with_more_heads(
            options.model, ranks, folder / f"{options.model.name}-more-heads"
        )
    else:
        shape = {"head_dim": 64, "hidden_size": 384, "intermediate_size": 512, "initializer_range": 0.15}
        experts = EXPERTS if "enable_expert_parallel" in options.settings else 0
        name = "random-mixtral" if experts else "random-llama"
        model = write_letters_model(folder / name, 4, ranks, experts, **shape)
    if options.dictionary:
        return model, more_heads.write_dictionary_with_more_heads(options.dictionary, model, folder / "its.safetensors")
    shape_alone = write_model(folder / "shape-alone", json.loads((model / "config.json").read_text()))
    return model, write_random_dictionary(shape_alone, atoms=1024)  # beside the weights vLLM would take it for some


def exact(options: argparse.Namespace, folder: Path, deadline: float, kept: Kept) -> None:
    """Compare what engines answer, each pair as soon as both have."""
    model, dictionary = prepare_model(options, folder)
    gpus = gpus_of(options)
    kinds = parallel_exact.engines(options.peer, options.gpus, str(dictionary))
    jobs = []
    for at, (name, kind) in enumerate(kinds.items()):
        own = {"model": str(model), "attention_backend": kind.backend, "lexico": kind.lexico}
        alone = kind.tensor * kind.pipeline == 1
        shown = (gpus[at % len(gpus)],) if gpus and alone else tuple(gpus)
        settings = EXACT_SETTINGS | kind.settings | options.settings | own | {"lock": str(folder / "lock")}
        jobs.append(Job(name, ("exact",), settings, shown))
    jobs = [job for job in jobs if not options.only or job.name in options.only]
    waves = [jobs[at : at + options.at_once] for at in range(0, len(jobs), options.at_once)]
    pairs, found = parallel_exact.pairs(options.peer, options.gpus), dict[str, parallel_exact.Found]()
    case = {"model": model.name, "gpus": options.gpus, "compiled": "compilation_config" not in options.settings}
    case |= {name: options.settings[name] for name in ("enable_expert_parallel",) if name in options.settings}
    for job, _, result in run_jobs(waves, __file__, options, deadline, kept):
        found[job.name] = result
        hits = parallel_exact.count(result, "hits")
        if not hits:
            kept.fault(f"{job.name} found nothing in its prefix cache")
        for verdict in [v for pair in list(pairs) if (v := parallel_exact.judge(pair, found))]:
            pairs.remove(verdict.pair)
            for row, words in parallel_exact.rows(verdict, found, case):
                kept.write(row, words)
            if verdict.fault:
                kept.fault(f"{verdict.pair.name} is too far apart: {verdict.fault}")


def speed(options: argparse.Namespace, folder: Path, deadline: float, kept: Kept) -> None:
    """Time engines on all GPUs, and on one GPU each with the part of the model that a rank has."""
    gpus, ranks = gpus_of(options), options.gpus
    shape = parallel_speed.LLAMA_3_1_70B | options.shape
    shapes = {"whole": shape, "part": parallel_speed.part_of_rank(shape, ranks)}
    models, cases = {}, {}
    for where, config in shapes.items():
        model = write_model(folder / where, config, options.layers)
        models[where] = model, write_random_dictionary(model)
        cases[where] = {"model": "Llama-3.1-70B shape", "layers": options.layers, "shrink": options.shrink}
        cases[where] |= {"tensor_parallel": ranks if where == "whole" else 1, "kv_heads": config["num_key_value_heads"]}
        cases[where] |= options.settings

    def job(where: str, engine: str, shown: tuple[str, ...]) -> Job:
        model, dictionary = models[where]
        settings = {"model": str(model)} | engine_speed.common_settings(options)
        settings |= engine_speed.engine_settings(engine, options.peer, dictionary)
        settings["tensor_parallel_size"] = cases[where]["tensor_parallel"]
        return Job(f"{engine} {where}", SPEED_MEASURES, settings, shown)

    waves, names = [], list(options.engines)
    for at in range(0, len(names), 2):  # two GPUs hold the parts of two engines
        waves += [[job("whole", engine, tuple(gpus))] for engine in names[at : at + 2]]
        waves += [[job("part", name, tuple(gpus[i : i + 1])) for i, name in enumerate(names[at : at + 2])]]
    shares = {name: engine_speed.bytes_percent(name) for name in names if name.startswith("LEXICO")}
    results: parallel_speed.Results = {"whole": {}, "part": {}}
    for one, measure, result in run_jobs(waves, __file__, options, deadline, kept):
        engine, where = one.name.split()
        results[where].setdefault(engine, {}).update(parallel_speed.metrics(measure, result))
        for row in parallel_speed.rows(results, cases, shares):
            kept.write(row, parallel_speed.words(row))
    for row in filter(parallel_speed.is_apart, parallel_speed.rows(results, cases, shares)):
        kept.fault(parallel_speed.words(row))


def train(options: argparse.Namespace, folder: Path, deadline: float, kept: Kept) -> None:
    """Train twice on one GPU, the first time while things are compiled, and then on all; compare the files."""
    gpus = gpus_of(options)
    model = options.model or prepare_model(options, folder)[0]
    runs: list[parallel_train.Trained] = []
    for at, shown in enumerate((gpus[:1], gpus[:1], gpus)):
        if (left := deadline - time.monotonic()) < 1:
            return kept.fault("out of time for training")
        device = "cuda" if gpus else "cpu"
        run = parallel_train.train(model, folder / f"trained-{at}.safetensors", shown, left, device=device)
        print(f"(training on {len(shown)} of the GPUs: {run.seconds:.1f} s)", flush=True)
        runs.append(run)
    for row, words in parallel_train.rows(runs, options.gpus, model.name):
        kept.write(row, words)
    return None


def main() -> None:
    """Read the command line, measure, say what was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--measure", nargs="+", default=list(MEASURES), help=f"some of {', '.join(MEASURES)}")
    parser.add_argument("--gpus", type=int, default=2, help="to share each model (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="end what has not answered by then")
    parser.add_argument("--engine-seconds", type=float, default=300, help="most that engines started together may take")
    parser.add_argument("--model", type=Path, help="checkpoint's folder for exact and train (default: random weights)")
    parser.add_argument("--dictionary", type=Path, help="its dictionary (default: random atoms)")
    parser.add_argument("--layers", type=int, default=16, help="of the 80 of the shape (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="engines of exact (default: all)")
    parser.add_argument("--engines", nargs="+", choices=SPEED_ENGINES, default=list(SPEED_ENGINES), help="of speed")
    parser.add_argument("--at-once", type=int, default=4, help="engines of exact that start together")
    parser.add_argument("--scale", type=int, default=4, help="of exact: 1 is a quick look")
    parser.add_argument(
        "--peer", default="FLASH_ATTN", help="backend in the place of FLASH_ATTN; for CPU_ATTN, processes"
    )
    parser.add_argument("--compile", action="store_true", help="of speed: let vLLM compile the rest of the model")
    parser.add_argument("--settings", type=json.loads, default={}, help="more settings of vLLM's LLM(), as JSON")
    parser.add_argument("--shape", type=json.loads, default={}, help="of speed: other values of config.json, to try it")
    parser.add_argument("--shrink", type=int, default=1, help="of speed: divide all lengths by this, to try it")
    parser.add_argument("--steps", type=int, default=144, help="of decode (default: %(default)s)")
    parser.add_argument("--logs", type=Path, default=Path("parallel_logs"), help="folder for the engines' messages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of parallel.jsonl")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--answer-tokens", type=int, default=128, help=argparse.SUPPRESS)  # of engine_speed.py
    parser.add_argument("--turns", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    if unknown := set(options.measure) - set(MEASURES):
        parser.error(refusal("--measure", " ".join(sorted(unknown)), ", ".join(MEASURES), "choose among these"))
    try:
        gpus_of(options)
    except ValueError as error:
        parser.exit(2, f"parallel: {error}\n")
    sys.exit(measure_all(options))


def measure_all(options: argparse.Namespace) -> int:
    """Everything that is asked for, one after another, and the faults; returns the exit status."""
    options.logs.mkdir(parents=True, exist_ok=True)
    end_orderly()
    deadline, kept = time.monotonic() + options.seconds, Kept(options.results)
    parts = {"exact": exact, "speed": speed, "train": train}
    with tempfile.TemporaryDirectory() as folder:
        for name in MEASURES:
            if name in options.measure:
                own = Path(folder) / name
                own.mkdir()
                try:
                    parts[name](options, own, deadline, kept)
                except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
                    traceback.print_exc()
                    kept.fault(f"{name} ended early: {error}")
    print("\n".join(["nothing was wrong"] if not kept.faults else [f"WRONG: {fault}" for fault in kept.faults]))
    return int(bool(kept.faults))


if __name__ == "__main__":
    main()
