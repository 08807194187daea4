"""`vllm-lexico eval`: what KV caches cost and what the model can still do with them, side by side."""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lexico.errors import check_whole_number, refusal
from vllm_lexico.evals.settings import (
    DEFAULT_CACHES,
    DEFAULT_TASKS,
    ENGINE_FLAGS,
    QUICK,
    QUICK_CACHES,
    TASK_FLAGS,
    CodeSettings,
    EvalSettings,
    Gsm8kSettings,
    NeedleSettings,
    PairsSettings,
    QaSettings,
    WikitextSettings,
)

if TYPE_CHECKING:
    from vllm_lexico.evals.caches import Cache

EXAMPLES = """examples:
  vllm-lexico eval Qwen/Qwen2.5-Coder-1.5B-Instruct --out results/first-look --quick
      does it work? some minutes on a GPU, with few questions
  vllm-lexico eval Qwen/Qwen2.5-Coder-1.5B-Instruct --out results/qwen
      every cache of the default list at every task; the data comes from the Hugging Face hub
  vllm-lexico eval Qwen/Qwen2.5-Coder-1.5B-Instruct --out results/documents --tasks qa,pairs,code
      what long documents lose: questions about them, exact strings, and programs after long code
  vllm-lexico eval ./my-finetune --data my-data --out results/mine --tasks gsm8k --caches lexico:15,lexico:7,bf16 \\
        --gsm8k-limit 200 --dictionary my-finetune.safetensors
      a quick look at one task; bf16 is what the others are compared with
  vllm-lexico eval Qwen/Qwen2.5-Coder-1.5B-Instruct --out results/windows --tasks gsm8k,wikitext \\
        --caches bf16,lexico:15+window=32,lexico:15+window=256,lexico:15+sinks=0,lexico:19/11,lexico:15+block_size=64
      a study of settings
  vllm-lexico eval --report results/qwen
      the tables of an evaluation, in Markdown

The same command goes on where an interrupted one stopped, and tries again what failed. More caches and tasks may be
added to a folder; other settings need another."""

CACHES = f"""separated by commas: lexico:S or lexico:K/V (atoms per vector of keys and values), bf16, or a
--kv-cache-dtype of vLLM; each with +name=value after it for a setting of LEXICO, block_size or
backend (default: {DEFAULT_CACHES}; {QUICK_CACHES} with --quick)"""


def add(commands: Any) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "eval",
        help="measure what KV caches cost and what the model can still do with them",
        description="Run LEXICO, bf16 and vLLM's other KV caches through the same vLLM on the same prompts, greedy, "
        "and write every prediction, the figures with 95 % intervals and the picture of quality against bytes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", nargs="?", help="Hugging Face id or folder of a model")
    parser.add_argument(
        "--report", metavar="DIR", type=_folder, help="print the tables of an evaluation and do nothing else"
    )
    parser.add_argument("--tasks", default=DEFAULT_TASKS, help="separated by commas (default: %(default)s)")
    parser.add_argument("--caches", help=CACHES)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a first look of some minutes on one GPU: few questions, said beside the results, and no compilation; "
        "other options come on top",
    )
    parser.add_argument("--dictionary", help="of LEXICO's caches (default: the one that serving would find)")
    parser.add_argument(
        "--data",
        metavar="DIR",
        type=_folder,
        help="folder of the files that the tasks read (default: the user's cache, made from the hub's datasets)",
    )
    parser.add_argument("--out", metavar="DIR", type=_folder, help="folder of the results")
    _add_tasks(parser.add_argument_group("tasks; with --quick the defaults are smaller"))
    engine = parser.add_argument_group("engine, for all caches")
    engine.add_argument("--max-model-len", type=int, help="(default: what the tasks need)")
    engine.add_argument("--max-num-seqs", type=int, help="(default: vLLM's)")
    engine.add_argument("--gpu-memory-utilization", type=float, help="(default: vLLM's)")
    engine.add_argument("--enforce-eager", action="store_const", const=True, help="start sooner, run slower")
    engine.add_argument("--engine-arguments", default="{}", metavar="JSON", help="more of vLLM's LLM(), as an object")
    engine.add_argument("--parallel", type=int, default=1, metavar="N", help="caches at a time (%(default)s)")
    engine.add_argument("--timeout", type=float, metavar="SECONDS", help="after which a cache is given up")
    parser.set_defaults(run=run, after_interrupt="the same command goes on with what is not finished")


def _add_tasks(tasks: Any) -> None:
    """Add the options of tasks; None where they are not given, for what `settings_of` takes then."""
    gsm8k, wikitext, needle = Gsm8kSettings(), WikitextSettings(), NeedleSettings()
    qa, pairs, code = QaSettings(), PairsSettings(), CodeSettings()
    lengths = " ".join(map(str, needle.lengths))
    for flag, metavar, words in (
        ("--qa-samples", "N", f"questions per number of passages ({qa.samples})"),
        ("--pairs-samples", "N", f"questions per number of pairs ({pairs.samples})"),
        ("--code-samples", "N", f"problems ({code.samples})"),
        ("--code-solved", "N", f"solved problems before each ({code.solved})"),
        ("--gsm8k-limit", "N", "the first N problems (all 1,319)"),
        ("--shots", "N", f"worked problems before each ({gsm8k.shots})"),
        ("--wikitext-windows", "N", "the first N windows (all)"),
        ("--wikitext-length", "TOKENS", f"tokens per window ({wikitext.length})"),
        ("--wikitext-skip", "TOKENS", f"first tokens of a window without a score ({wikitext.skip})"),
        ("--chunk-tokens", "TOKENS", f"tokens of a window that a step computes ({wikitext.chunk})"),
        ("--needle-samples", "N", f"documents per length and kind ({needle.samples})"),
        ("--needle-keys", "N", f"needles in a document of several ({needle.keys})"),
    ):
        tasks.add_argument(flag, type=int, metavar=metavar, help=words)
    tasks.add_argument("--needle-lengths", type=int, nargs="+", metavar="TOKENS", help=f"of a document ({lengths})")
    passages, counts = (" ".join(map(str, sizes)) for sizes in (qa.passages, pairs.pairs))
    tasks.add_argument("--qa-passages", type=int, nargs="+", metavar="N", help=f"in a context ({passages})")
    tasks.add_argument("--pairs", type=int, nargs="+", metavar="N", help=f"of keys and values in a context ({counts})")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, or print the tables of an evaluation; ValueError at the end where a cache failed."""
    # Not at the top, since these import torch: a parser, and so --help, must not wait for it.
    from vllm_lexico.evals.caches import parse_caches
    from vllm_lexico.evals.fetch import fetch_data
    from vllm_lexico.evals.results.summary import read_metrics
    from vllm_lexico.evals.results.tables import report
    from vllm_lexico.evals.run import run_evaluation
    from vllm_lexico.evals.tasks import parse_tasks

    if arguments.report:
        print(report(read_metrics(arguments.report)), end="")
        return
    for name in ("model", "out"):
        if not getattr(arguments, name):
            raise ValueError(f"{'MODEL' if name == 'model' else '--' + name} is missing; see vllm-lexico eval --help")
    if arguments.timeout is not None and not 0 < arguments.timeout < math.inf:
        raise ValueError(refusal("--timeout", arguments.timeout, "more than 0 seconds", "leave it out"))
    check_whole_number("--parallel", arguments.parallel, 1, 1000, "leave it out for 1")
    tasks = parse_tasks(arguments.tasks)
    named = arguments.caches if arguments.caches is not None else QUICK_CACHES if arguments.quick else DEFAULT_CACHES
    caches = parse_caches(named, arguments.dictionary)
    settings = settings_of(arguments, arguments.data or Path())
    _check_places(arguments, caches, settings.engine.get("revision"))
    if not arguments.data:
        settings = replace(settings, data=str(fetch_data(tasks)))
    failures = run_evaluation(
        settings,
        caches,
        tasks,
        arguments.out,
        parallel=arguments.parallel,
        timeout_seconds=arguments.timeout,
    )
    _print_results(arguments.out)
    if failures:
        raise ValueError(
            f"{len(failures)} of {len(caches) * len(tasks)} results are missing: {', '.join(failures)}; the reasons "
            f"are above and in each cache's folder"
        )


def _print_results(out: Path) -> None:
    """Print the overview of a folder's results and what is lost; nothing where it has no result."""
    from vllm_lexico.evals.results.losses import loss_lines
    from vllm_lexico.evals.results.summary import METRICS_FILE, PICTURE_FILE, TABLE_FILE, read_metrics
    from vllm_lexico.evals.results.tables import overview

    metrics = read_metrics(out)
    if not any(cache["tasks"] for cache in metrics["caches"].values()):
        return
    print(overview(metrics))
    written = [name for name in (METRICS_FILE, TABLE_FILE, PICTURE_FILE) if (out / name).exists()]
    print(f"\nin {out}: {', '.join(written)}; more tables: vllm-lexico eval --report {out}")
    if lines := loss_lines(metrics):
        print("\n" + "\n".join(lines))


def _check_places(arguments: argparse.Namespace, caches: "Sequence[Cache]", revision: Any) -> None:
    """Refuse what is named and not there, before data is fetched or an engine starts: each would fail on its own.

    Args:
        arguments: of the command line.
        caches: that it names, of which LEXICO's may name dictionaries of their own.
        revision: of the model on the hub that vLLM will be given, or None.

    Raises:
        ValueError: the folder of results cannot be one, or there is no such model, dictionary or argument of vLLM's.
    """
    from vllm_lexico.check.source import config_folder
    from vllm_lexico.config import TRAIN
    from vllm_lexico.dictionary.file import read_info
    from vllm_lexico.dictionary.search import find_dictionary
    from vllm_lexico.evals.folder import check_out
    from vllm_lexico.evals.identity import weights_of

    check_out(arguments.out)
    if not isinstance(revision, str) or Path(arguments.model).exists() or weights_of(arguments.model, revision) is None:
        config_folder(arguments.model)
    fingerprint: Any = None  # a dictionary that is named is taken whatever the model is
    for dictionary in dict.fromkeys([arguments.dictionary, *(cache.dictionary for cache in caches)]):
        if dictionary not in (None, TRAIN):
            read_info(find_dictionary(dictionary, arguments.model, fingerprint))
    if (given := _json_object(arguments.engine_arguments)) and find_spec("vllm") is not None:
        from vllm_lexico.evals.engine import check_arguments  # imports vLLM, which takes seconds

        check_arguments(given)


def settings_of(arguments: argparse.Namespace, data: Path) -> EvalSettings:
    """The settings that the command line asks for; ValueError for those that are not allowed.

    Args:
        arguments: of the command line.
        data: folder of the files that the tasks read.
    """
    engine = {name: value for name, flag in ENGINE_FLAGS.items() if (value := _value(arguments, flag)) is not None}
    if arguments.quick:
        engine["enforce_eager"] = True
    defaults = EvalSettings(arguments.model, str(data), engine | _json_object(arguments.engine_arguments))
    if arguments.quick:
        defaults = replace(defaults, **QUICK)
    tasks: dict[str, Any] = {}
    for task, flags in TASK_FLAGS.items():
        given = {name: value for name, flag in flags.items() if (value := _value(arguments, flag)) is not None}
        tasks[task] = replace(getattr(defaults, task), **given)
    return replace(defaults, **tasks)


def _value(arguments: argparse.Namespace, flag: str) -> Any:
    """What a flag was given, sizes as a tuple; None where it was left out."""
    value = getattr(arguments, flag.removeprefix("--").replace("-", "_"))
    return tuple(value) if isinstance(value, list) else value


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
