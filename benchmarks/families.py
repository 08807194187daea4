"""Models in which a part of the layers is coded: tokens that fit, and decode, beside vLLM without LEXICO.

    python benchmarks/families.py                            # the shapes of four families with dummy weights
    python benchmarks/families.py --families gemma qwen --seconds 300
    python benchmarks/families.py --families qwen --together --block-sizes 0 4096 --cache-gib 8

Each family runs twice on the same GPU, without LEXICO (vLLM chooses all backends) and with it at 12.5 %, with
torch.compile and FULL CUDA graphs, at 131,072 tokens and with weights as a new model draws them
(`bench/drawn_weights.py`); several GPUs take families in turn. --together starts all engines
at once on one GPU, which must hold them, and measures one after another when all have started: the minutes that an
engine compiles are had once. --block-sizes runs LEXICO with each of these blocks, 0 for its own choice. Rows go to
benchmarks/results/families.jsonl:

kv_cache_tokens           that fit into --cache-gib, as vLLM counts them when it starts.
decode_tokens_per_second  of 8 sequences of 32k tokens.
prefix_hit_tokens         of eight prompts of up to 32k tokens that are asked a second time, together.

--measure profile, which gives no row, prints what a GPU does in a step of such a decode.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench import engine_loads, step_profile
from bench.drawn_weights import DRAWS
from bench.engine_process import PASSED_ON, EngineProcess, Run, answer
from bench.family_shapes import SHAPES
from bench.parallel_jobs import ENVIRONMENT, Job, Kept, Result, measured, run_jobs
from bench.record import RESULTS
from bench.shapes import write_model, write_random_dictionary
from bench.terminated import end_orderly

PLAIN, CODED = "vLLM", "LEXICO"
MEASURES, PROFILE = ("fit", "hits", "decode"), "profile"
GRAPHS = {"mode": 3, "cudagraph_mode": "FULL_AND_PIECEWISE", "cudagraph_capture_sizes": [1, 2, 4, 8]}
MAX_MODEL_LEN, CONTEXT = 131072, 32768
NEW_TOKENS = [*range(17, 25)]  # of eight requests that decode: their blocks end at different steps
STARTED = "started"  # what an engine answers before it measures, where others start beside it
HIT_LENGTHS = tuple(random.Random(0).sample(range(CONTEXT // 8, CONTEXT), 8))  # hits end at blocks, so of any length


def serve(options: argparse.Namespace) -> None:
    """Wait for an engine's settings on standard input, start it and print each measure's result, null if it failed."""
    from vllm import LLM

    llm = LLM(**json.loads(sys.stdin.readline()))
    llm.collective_rpc("draw_weights")
    driver = engine_loads.Driver(llm)
    gc.collect()
    gc.freeze()  # as engine_speed.py does
    cache, context = llm.llm_engine.vllm_config.cache_config, CONTEXT // options.shrink
    measures: dict[str, Any] = {
        STARTED: dict,
        "fit": lambda: {"tokens": cache.kv_cache_size_tokens, "block_size": cache.block_size},
        "hits": lambda: hit_tokens(llm, driver, [length // options.shrink for length in HIT_LENGTHS]),
        "decode": lambda: engine_loads.decode_after_fill(driver, 8, context, options.steps, {"spread": NEW_TOKENS}),
        PROFILE: lambda: profile_decode(llm, driver, context),
    }
    for name in options.measure:
        answer(name, measures[name])
        if name == STARTED:
            sys.stdin.read()  # which ends when it is this engine's turn


def profile_decode(llm: Any, driver: engine_loads.Driver, context: int) -> dict[str, Any]:
    """What a GPU does in a step of decode of eight contexts; see `step_profile.summary`."""
    contexts = driver.prompts([context // engine_loads.BLOCK_TOKENS * engine_loads.BLOCK_TOKENS] * 8)
    driver.run(contexts, 1)
    folder = Path(llm.llm_engine.vllm_config.profiler_config.torch_profiler_dir)
    return step_profile.profile(driver, contexts, NEW_TOKENS, folder)


def hit_tokens(llm: Any, driver: engine_loads.Driver, lengths: list[int]) -> dict[str, Any]:
    """Tokens of prompts that the prefix cache has when they are asked again, together and of each."""
    from vllm import SamplingParams

    asked = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
    hits = []
    for prompt in driver.prompts(lengths):
        for _ in range(2):
            (output,) = llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        hits.append(output.num_cached_tokens)
    return {"tokens": sum(hits), "prompt_tokens": lengths, "hits": hits}


def jobs_of(family: str, folder: Path, gpu: str, options: argparse.Namespace) -> list[Job]:
    """The family's engines: vLLM's, and LEXICO's with each size of blocks."""
    shape = SHAPES[family]
    model = write_model(folder / family, shape.config | options.shape)
    dictionary = write_random_dictionary(model).rename(folder / f"{family}.safetensors")
    common = {
        "model": str(model),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "max_model_len": MAX_MODEL_LEN // options.shrink,
        "max_num_batched_tokens": max(2048 // options.shrink, 256),
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": int(options.cache_gib * 2**30),
        "enable_prefix_caching": True,
        "compilation_config": GRAPHS,
    }
    common |= DRAWS | options.settings
    lexico = {"dictionary": str(dictionary), "sparsity": shape.sparsity}
    coded = {"attention_backend": "LEXICO", "additional_config": {"lexico": lexico}}
    gpus = (gpu,) if gpu else ()
    measures = tuple(options.measure)
    blocks = {size: {"block_size": size} if size else {} for size in options.block_sizes}
    jobs = {f"{family} {PLAIN}": common | options.peer_settings}
    jobs |= {coded_name(family, size): common | coded | own for size, own in blocks.items()}
    if PROFILE in measures:
        for name, settings in jobs.items():
            settings |= step_profile.settings(options.logs / f"{name} {PROFILE}".replace(" ", "-"))
    return [Job(name, measures, settings, gpus) for name, settings in jobs.items()]


def coded_name(family: str, block_size: int) -> str:
    """Of LEXICO's engine with blocks of so many tokens, 0 for its own choice."""
    return f"{family} {CODED}{f' {block_size}' if block_size else ''}"


def write_rows(
    family: str, block_size: int, found: dict[str, dict[str, Any]], kept: Kept, options: argparse.Namespace
) -> None:
    """The rows that follow from what vLLM's engine of a family and LEXICO's with such blocks have measured."""
    theirs, ours = found.get(f"{family} {PLAIN}", {}), found.get(coded_name(family, block_size), {})
    case = {"model": SHAPES[family].name, "bytes_percent": 12.5, "max_model_len": MAX_MODEL_LEN // options.shrink}
    case |= {"cache_gib": options.cache_gib, **options.shape, **options.settings}
    case |= {"block_size": block_size} if block_size else {}
    family = coded_name(family, block_size) if block_size else family
    for measure, metric, key in (("fit", "kv_cache_tokens", "tokens"), ("hits", "prefix_hit_tokens", "tokens")):
        if measure in ours and measure in theirs:
            pair = ours[measure][key], theirs[measure][key]
            words = f"{family}: {metric} {pair[0]:,}, {pair[0] / max(pair[1], 1):.2f} times vLLM's without LEXICO"
            more = {name: value for name, value in ours[measure].items() if name != key}
            more |= {"hits_without": theirs[measure]["hits"]} if measure == "hits" else {}
            kept.write((case | more, metric, pair[0], PLAIN, pair[1]), words)
    if "decode" in ours and "decode" in theirs:
        ours, theirs = ours["decode"]["spread"], theirs["decode"]["spread"]
        at = case | {"sequences": 8, "context": CONTEXT // options.shrink, "median_ms": ours["median_ms"]}
        at |= {"peer_median_ms": theirs["median_ms"]}  # by which a peer that was disturbed is seen
        pair = ours["tokens_per_second"], theirs["tokens_per_second"]
        words = f"{family}: decode {pair[0]:,.0f} tokens/s, {pair[0] / pair[1]:.2f} times vLLM's without LEXICO"
        kept.write((at, "decode_tokens_per_second", pair[0], PLAIN, pair[1]), words)


def measure_all(options: argparse.Namespace, folder: Path) -> list[str]:
    """Run the families, on as many GPUs as there are; what was wrong."""
    import torch

    gpus = [str(at) for at in range(torch.cuda.device_count())][: 1 if options.together else options.gpus] or [""]
    lanes: list[list[Job]] = [[] for _ in gpus]
    for at, family in enumerate(options.families):
        lanes[at % len(gpus)] += jobs_of(family, folder, gpus[at % len(gpus)], options)
    waves = [[lane[at] for lane in lanes if at < len(lane)] for at in range(max(map(len, lanes)))]
    kept, found = Kept(options.results, "families"), dict[str, dict[str, Any]]()
    deadline = time.monotonic() + options.seconds
    if options.together:
        results = run_together(lanes[0], __file__, options, deadline, kept)
    else:
        results = run_jobs(waves, __file__, options, deadline, kept)
    for job, measure, result in results:
        shown = step_profile.table(result) if measure == PROFILE else json.dumps(result)
        print(f"{job.name} {measure}: {shown}", flush=True)
        found.setdefault(job.name, {})[measure] = result
        for block_size in options.block_sizes:
            write_rows(job.name.split()[0], block_size, found, kept, options)
    return kept.faults


def run_together(
    jobs: list[Job], script: str, options: argparse.Namespace, deadline: float, kept: Kept
) -> Iterator[Result]:
    """Start all engines at once; what each measures, one after another, once all have started or it is too late.

    Those that have not started when half of the time is over are given up. Arguments as `run_jobs` has them.
    """
    runs = [Run(job.name, (STARTED, *job.measures)) for job in jobs]
    processes = [
        EngineProcess(run, job.settings, options, script, ENVIRONMENT) for run, job in zip(runs, jobs, strict=True)
    ]
    last_start = time.monotonic() + (deadline - time.monotonic()) / 2
    try:
        for process in processes:
            process.begin()
        started = []
        for job, process in zip(jobs, processes, strict=True):
            left = max(last_start - time.monotonic(), 1)
            if next(process.answers(left), None) is None:
                process.complain()
                kept.fault(f"{job.name} has not started; see {process.log}")
            else:
                print(f"({job.name} has started)", flush=True)
                started.append((job, process))
        for job, process in started:
            seconds = max(min(options.engine_seconds, deadline - time.monotonic()), 1)
            yield from measured(job, process, seconds, kept)
    finally:
        for process in processes:
            process.stop()


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", choices=SHAPES, default=list(SHAPES))
    measures = f"of {', '.join(MEASURES)} (default: all of them) and {PROFILE}"
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=(STARTED, *MEASURES, PROFILE),
        default=list(MEASURES),
        metavar="MEASURE",
        help=measures,
    )
    parser.add_argument("--gpus", type=int, default=8, help="use no more than this many (default: all)")
    parser.add_argument("--together", action="store_true", help="start all engines at once, on one GPU")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[0], help="of LEXICO (default: its own choice)")
    parser.add_argument("--seconds", type=float, default=1800, help="start no engine that would end later, roughly")
    parser.add_argument("--engine-seconds", type=float, default=400, help="most that an engine may take")
    parser.add_argument("--cache-gib", type=float, default=40, help="of the KV cache (default: %(default)s)")
    parser.add_argument("--settings", type=json.loads, default={}, help="more settings of vLLM's LLM(), as JSON")
    parser.add_argument("--peer-settings", type=json.loads, default={}, help="of the engines without LEXICO, as JSON")
    parser.add_argument("--shape", type=json.loads, default={}, help="other values of config.json, to try this out")
    parser.add_argument("--shrink", type=int, default=1, help="divide all lengths by this, to try this out")
    parser.add_argument("--steps", type=int, default=144, help="of decode")
    parser.add_argument("--logs", type=Path, default=Path("families_logs"), help="folder for the engines' messages")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of families.jsonl")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    for name in PASSED_ON:  # what `EngineProcess` passes on
        if name not in ("shrink", "steps"):
            parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return 0
    end_orderly()
    options.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        return 1 if measure_all(options, Path(folder)) else 0


if __name__ == "__main__":
    sys.exit(main())
