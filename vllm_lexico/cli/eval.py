"""`vllm-lexico eval`: what KV caches cost and what the model can still do with them, side by side."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from vllm_lexico.errors import check_whole_number, refusal
from vllm_lexico.evals.settings import (
    DEFAULT_CACHES,
    DEFAULT_TASKS,
    EvalSettings,
    Gsm8kSettings,
    NeedleSettings,
    WikitextSettings,
)

EXAMPLES = """examples:
  vllm-lexico eval Qwen/Qwen2.5-Coder-1.5B-Instruct --data data --out results/qwen
      every cache of the default list at every task
  vllm-lexico eval ./my-finetune --data data --out results/mine --tasks gsm8k --caches lexico:15,lexico:7,bf16 \\
        --gsm8k-limit 200 --dictionary my-finetune.safetensors
      a quick look at one task; bf16 is what the others are compared with
  vllm-lexico eval Qwen/Qwen2.5-Coder-1.5B-Instruct --data data --out results/windows --tasks gsm8k,wikitext \\
        --caches bf16,lexico:15+window=32,lexico:15+window=256,lexico:15+sinks=0,lexico:19/11,lexico:15+block_size=64
      a study of settings
  vllm-lexico eval --report results/qwen
      the tables of an evaluation, in Markdown

The same command goes on where an interrupted one stopped, and tries again what failed. More caches and tasks may be
added to a folder; other settings need another."""

CACHES = """separated by commas: lexico:S or lexico:K/V (atoms per vector of keys and values), bf16, or a
--kv-cache-dtype of vLLM; each with +name=value after it for a setting of LEXICO, block_size or
backend (default: %(default)s)"""


def add(commands: Any) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "eval",
        help="measure what KV caches cost and what the model can still do with them",
        description="Run LEXICO, bf16 and vLLM's other KV caches through the same vLLM on the same prompts, greedy, "
        "and write every prediction, the figures with 95 %% intervals and the picture of quality against bytes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    gsm8k, wikitext, needle = Gsm8kSettings(), WikitextSettings(), NeedleSettings()
    parser.add_argument("model", metavar="MODEL", nargs="?", help="Hugging Face id or folder of a model")
    parser.add_argument(
        "--report", metavar="DIR", type=_folder, help="print the tables of an evaluation and do nothing else"
    )
    parser.add_argument("--tasks", default=DEFAULT_TASKS, help="separated by commas (default: %(default)s)")
    parser.add_argument("--caches", default=DEFAULT_CACHES, help=CACHES)
    parser.add_argument("--dictionary", help="of LEXICO's caches (default: the one that serving would find)")
    parser.add_argument("--data", metavar="DIR", type=_folder, help="folder of the files that the tasks read")
    parser.add_argument("--out", metavar="DIR", type=_folder, help="folder of the results")
    tasks = parser.add_argument_group("tasks")
    tasks.add_argument("--gsm8k-limit", type=int, metavar="N", help="the first N problems (default: all 1,319)")
    tasks.add_argument("--shots", type=int, default=gsm8k.shots, help="worked problems before each (%(default)s)")
    tasks.add_argument("--wikitext-windows", type=int, metavar="N", help="the first N windows (default: all)")
    tasks.add_argument("--wikitext-length", type=int, default=wikitext.length, help="tokens per window (%(default)s)")
    tasks.add_argument(
        "--wikitext-skip",
        type=int,
        default=wikitext.skip,
        help="first tokens of a window without a score (%(default)s)",
    )
    tasks.add_argument(
        "--chunk-tokens", type=int, default=wikitext.chunk, help="tokens of a window that a step computes (%(default)s)"
    )
    tasks.add_argument("--needle-lengths", type=int, nargs="+", default=needle.lengths, help="in tokens (%(default)s)")
    tasks.add_argument(
        "--needle-samples", type=int, default=needle.samples, help="documents per length and kind (%(default)s)"
    )
    tasks.add_argument(
        "--needle-keys", type=int, default=needle.keys, help="needles in a document of several (%(default)s)"
    )
    engine = parser.add_argument_group("engine, for all caches")
    engine.add_argument("--max-model-len", type=int, help="(default: what the tasks need)")
    engine.add_argument("--max-num-seqs", type=int, help="(default: vLLM's)")
    engine.add_argument("--gpu-memory-utilization", type=float, help="(default: vLLM's)")
    engine.add_argument("--enforce-eager", action="store_true", help="start sooner, run slower")
    engine.add_argument("--engine-arguments", default="{}", metavar="JSON", help="more of vLLM's LLM(), as an object")
    engine.add_argument("--parallel", type=int, default=1, metavar="N", help="caches at a time (%(default)s)")
    engine.add_argument("--timeout", type=float, metavar="SECONDS", help="after which a cache is given up")
    parser.set_defaults(run=run, after_interrupt="the same command goes on with what is not finished")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, or print the tables of an evaluation; ValueError at the end where a cache failed."""
    # Not at the top, since these import torch: a parser, and so --help, must not wait for it.
    from vllm_lexico.evals.caches import parse_caches
    from vllm_lexico.evals.results.summary import METRICS_FILE, PICTURE_FILE, TABLE_FILE, read_metrics
    from vllm_lexico.evals.results.tables import overview, report
    from vllm_lexico.evals.run import run_evaluation
    from vllm_lexico.evals.tasks import parse_tasks

    if arguments.report:
        print(report(read_metrics(arguments.report)), end="")
        return
    for name in ("model", "data", "out"):
        if not getattr(arguments, name):
            raise ValueError(f"{'MODEL' if name == 'model' else '--' + name} is missing; see vllm-lexico eval --help")
    if arguments.timeout is not None and not 0 < arguments.timeout < math.inf:
        raise ValueError(refusal("--timeout", arguments.timeout, "more than 0 seconds", "leave it out"))
    check_whole_number("--parallel", arguments.parallel, 1, 1000, "leave it out for 1")
    tasks = parse_tasks(arguments.tasks)
    caches = parse_caches(arguments.caches, arguments.dictionary)
    failures = run_evaluation(
        settings_of(arguments),
        caches,
        tasks,
        arguments.out,
        parallel=arguments.parallel,
        timeout_seconds=arguments.timeout,
    )
    print(overview(read_metrics(arguments.out)))
    written = [name for name in (METRICS_FILE, TABLE_FILE, PICTURE_FILE) if (arguments.out / name).exists()]
    print(f"\nin {arguments.out}: {', '.join(written)}; more tables: vllm-lexico eval --report {arguments.out}")
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(caches) * len(tasks)} results are missing: {', '.join(failures)}; the reasons "
            f"are above and in each cache's folder"
        )


def settings_of(arguments: argparse.Namespace) -> EvalSettings:
    """The settings that the command line asks for; ValueError for those that are not allowed."""
    flags = ("max_model_len", "max_num_seqs", "gpu_memory_utilization")
    engine = {name: value for name in flags if (value := getattr(arguments, name)) is not None}
    engine |= ({"enforce_eager": True} if arguments.enforce_eager else {}) | _json_object(arguments.engine_arguments)
    return EvalSettings(
        model=arguments.model,
        data=str(arguments.data),
        engine=engine,
        gsm8k=Gsm8kSettings(arguments.shots, arguments.gsm8k_limit),
        wikitext=WikitextSettings(
            arguments.wikitext_length, arguments.wikitext_skip, arguments.wikitext_windows, arguments.chunk_tokens
        ),
        needle=NeedleSettings(tuple(arguments.needle_lengths), arguments.needle_samples, arguments.needle_keys),
    )


def _folder(given: str) -> Path | None:
    """A path; None for no words, which are no name of a folder."""
    return Path(given) if given else None


def _json_object(given: str) -> dict[str, Any]:
    """The value of an option that is a JSON object."""
    from pydantic_core import from_json

    try:
        values = from_json(given, allow_inf_nan=False)
        json.dumps(values, allow_nan=False)  # a number as large as 1e999 is none
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ValueError('--engine-arguments is no JSON object; allowed: e.g. \'{"dtype": "float16"}\'')
    return values
