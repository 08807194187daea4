"""`vllm-lexico check`: what LEXICO would do for a model, before anything is downloaded, trained or started."""

import argparse
import json
import re
import textwrap
from typing import TYPE_CHECKING, Any

from vllm_lexico.dictionary.names import printable
from vllm_lexico.errors import refusal, shown

if TYPE_CHECKING:
    from vllm_lexico.check.report import Report

GIB = 1 << 30
UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 1 << 20, "mib": 1 << 20, "mb": 10**6, "tib": 1 << 40}
DEFAULT_MEMORY = "80GiB"
WIDTH, INDENT = 110, 14
NOT_SUPPORTED = 1  # exit status

EXAMPLES = """examples:
  vllm-lexico check Qwen/Qwen3-8B
      is it supported, is there a dictionary, how many tokens fit
  vllm-lexico check Qwen/Qwen3-32B --gpu-memory 24GiB --tensor-parallel-size 4 --max-model-len 32768
      on other GPUs than one of 80 GiB
  vllm-lexico check ./my-finetune --json
      the same for programs; the exit status is 1 where the model is not supported"""


def add(commands: Any) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "check",
        help="see whether a model is supported, and how many tokens fit",
        description="Say from a model's configuration alone, without a GPU and without its weights, whether LEXICO "
        "serves it, whether there is a dictionary, and how many tokens fit into a GPU at each sparsity.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="Hugging Face id or folder of a model")
    parser.add_argument(
        "--gpu-memory", metavar="SIZE", help=f"of each GPU (default: the one that is here, else {DEFAULT_MEMORY})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    same = parser.add_argument_group("the same as of vllm serve")
    same.add_argument("--max-model-len", type=whole_number, metavar="N", help="such as 32768 (default: the model's)")
    same.add_argument(
        "--tensor-parallel-size", type=whole_number, default=1, metavar="T", help="(default: %(default)s)"
    )
    same.add_argument("--gpu-memory-utilization", type=float, metavar="SHARE", help="(default: vLLM's, 0.92)")
    same.add_argument(
        "--max-num-batched-tokens", type=whole_number, metavar="N", help="(default: vLLM's for such a GPU)"
    )
    same.add_argument("--kv-cache-memory-bytes", metavar="SIZE", help="(default: what weights and the rest leave)")
    same.add_argument("--hf-overrides", default="", metavar="JSON", help="changes of the model's configuration")
    parser.set_defaults(run=run, after_interrupt="nothing was changed", only_prints=True)


def run(arguments: argparse.Namespace) -> int:
    """Print what is found out; the exit status says whether the model is supported."""
    # Not at the top, since these import torch: a parser, and so --help, must not wait for it.
    from vllm_lexico.check.report import UTILIZATION, Asked, as_json, make_report

    utilization, cache = arguments.gpu_memory_utilization, arguments.kv_cache_memory_bytes
    given = parse_size("--gpu-memory", arguments.gpu_memory) if arguments.gpu_memory else _memory_here()
    asked = Asked(
        model=arguments.model,
        gpu_memory=given or parse_size("--gpu-memory", DEFAULT_MEMORY),
        assumed=not given,
        max_model_len=arguments.max_model_len,
        gpus=arguments.tensor_parallel_size,
        utilization=UTILIZATION if utilization is None else utilization,
        chunk_tokens=arguments.max_num_batched_tokens,
        kv_cache=parse_size("--kv-cache-memory-bytes", cache, unit=1) if cache else None,
        overrides=arguments.hf_overrides,
    )
    report = make_report(asked)
    print(json.dumps(as_json(report), indent=1) if arguments.json else "\n".join(describe(report)))
    return 0 if report.supported else NOT_SUPPORTED


def whole_number(given: str) -> int:
    """A whole number of a flag; argparse names the flag."""
    try:
        return int(given)
    except ValueError:
        words = f"{shown(given)} is no whole number; write it out, such as 32768 for 32k"
        raise argparse.ArgumentTypeError(words) from None


def parse_size(flag: str, given: str, unit: int = GIB) -> int:
    """Bytes of a size as people write it: "80GiB", "80 GB", "24576MiB", or a number alone.

    Args:
        flag: that it was given to.
        given: the words.
        unit: bytes of a number alone.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", given.strip().casefold())
    factor = UNITS.get(found[2]) if found else None
    if found is None or factor is None or float(found[1]) <= 0:
        raise ValueError(refusal(flag, given, "a size such as 80GiB, 24GB or 512MiB", "correct it"))
    return int(float(found[1]) * (factor if found[2] else unit))


def _memory_here() -> int:
    """Bytes of the GPU that is here, or 0."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else 0


def describe(report: "Report") -> list[str]:
    """The lines that a person reads."""
    kind = f" ({report.known_shape.whole.model_type})" if report.known_shape else ""
    name = f"{printable(report.asked.model)}{kind}"
    if not report.supported:
        lines = [f"{name}: LEXICO does not serve it.", ""]
        lines += [line for reason in report.reasons for line in _entry("Why", f"{reason}.")]
        return lines
    return [
        f"{name}: LEXICO serves it.",
        "",
        *_entry("Layers", _layers(report)),
        *_entry("Dictionary", _dictionary(report)),
        *_entry("Memory", _memory(report)),
        *_entry("Requests", _requests(report)),
        "",
        *_table(report),
        "",
        *_closing(report),
    ]


def _entry(title: str, words: str) -> list[str]:
    """A title and words beside it, over several lines where they are long; a command is never cut."""
    return textwrap.wrap(
        words,
        WIDTH,
        initial_indent=title.ljust(INDENT),
        subsequent_indent=" " * INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _layers(report: "Report") -> str:
    shape = report.shape
    heads = f"{shape.heads.number} KV heads of {shape.heads.size}"
    if not shape.others:
        return f"all {shape.num_layers} are coded; {heads}"
    cacheless = [one for one in shape.others if one.window is None and not one.keeps_state]
    beside = [one for one in shape.others if {*one.layers} & {*shape.coded}]
    left = [f"{len(one.layers)} {one.kind}" for one in shape.others if one not in [*cacheless, *beside]]
    words = f"{len(shape.coded)} of {shape.num_layers} are coded ({heads})"
    if left:
        words += f"; {' and '.join(left)} are left to vLLM, as without LEXICO"
    words += "".join(f"; {len(one.layers)} {one.kind}, which is left to vLLM" for one in beside)
    return words + "".join(f"; {len(one.layers)} {one.kind} have no cache" for one in cacheless)


def _dictionary(report: "Report") -> str:
    state = report.dictionary
    assert state is not None
    if state.path is not None:
        origin = "" if state.own else f", made for {printable(str(state.made_for))}, which has the same shape"
        return f"found: {printable(str(state.path))} ({state.atoms} atoms{origin})"
    if state.several:
        return state.several
    minutes, weights = max(round(state.minutes), 1), report.budget.weights if report.budget else None
    fits = (weights or 0) * report.asked.gpus < 0.9 * UNITS["gib"] * 80
    where = "one H100" if fits else "H100s that hold its weights"
    return (
        f"none yet. Make it once: {state.command} (about {minutes} minute{'s' * (minutes > 1)} on {where} with --data, "
        f"longer where the model writes the text itself; predicted from {state.based_on})"
    )


def _memory(report: "Report") -> str:
    budget, asked = report.budget, report.asked
    assert budget is not None
    if asked.kv_cache is not None:
        return f"a cache of {_gib(budget.cache)}, as given"
    each = " on each GPU" if asked.gpus > 1 else ""
    each += ", assumed, as no GPU is here (--gpu-memory)" if asked.assumed else ""
    weights = (
        f"{_gib(budget.weights)} (from {budget.weights_from})" if budget.weights else "of unknown size, not counted"
    )
    return (
        f"{_gib(budget.total)}{each}, of which vLLM takes {asked.utilization:.0%}: weights {weights}, dictionary "
        f"{_gib(budget.dictionary)}, about {_gib(budget.allowance)} to work with (an estimate), cache "
        f"{_gib(max(budget.cache, 0))}"
    )


def _requests(report: "Report") -> str:
    words = f"of up to {report.max_model_len:,} tokens"
    longer = report.shape.longest
    if report.asked.max_model_len is None and longer > report.max_model_len:
        return f"{words}, as vLLM takes them by itself; the model reaches {longer:,}, see --max-model-len"
    return words


def _table(report: "Report") -> list[str]:
    """The caches, side by side."""
    from vllm_lexico.check.memory import SETTINGS

    plain, length = report.rows[0], report.max_model_len
    cells = [("cache", "bytes per token", "of bf16", "and per request", "tokens that fit", "times bf16")]
    for row in report.rows:
        default = " (default)" if row.sparsity == SETTINGS.sparsity.key else ""
        fixed, comparable = row.plan.other_bytes, min(row.tokens, plain.tokens) >= length
        cells.append(
            (
                "bf16" if row.sparsity is None else f"sparsity {row.sparsity}{default}",
                f"{row.plan.token_bytes:,}",
                f"{100 * row.plan.token_bytes / plain.plan.token_bytes:.4g} %",
                f"{fixed / (1 << 20):,.1f} MiB" if fixed else "-",
                f"{row.tokens:,}" if row.tokens >= length else "not one request",
                f"{row.tokens / plain.tokens:.1f}" if comparable else "-",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]


def _closing(report: "Report") -> list[str]:
    """What the table means, and what to do next."""
    from vllm_lexico.check.memory import SETTINGS

    windows, step = any(one.window for one in report.shape.others), report.asked.step_tokens
    words = (
        f"Tokens that fit: in requests of {report.max_model_len:,} tokens, as vLLM counts them when it starts. Each "
        f"request also keeps its newest {SETTINGS.window} tokens in full, and the pages with its first {SETTINGS.sinks}"
    )
    if windows:
        words += (
            f", and the windows of the other layers with the up to {step:,} tokens that vLLM computes at a time: a "
            "smaller --max-num-batched-tokens leaves more room"
        )
    if report.shape.keeps_states:
        words += ", and the states of the layers that have one"
    lines = textwrap.wrap(f"{words}.", WIDTH)
    if advice := _when_nothing_fits(report):
        return [*lines, *textwrap.wrap(advice, WIDTH)]
    other = """--additional-config '{"lexico": {"sparsity": 7}}'"""
    return [*lines, "", f"Serve it          {report.command}", f"Another sparsity  {other}"]


def _when_nothing_fits(report: "Report") -> str:
    """What to do where no cache holds a request, so that no command would serve the model; or nothing."""
    from vllm_lexico.check.report import gpus_needed

    budget, asked = report.budget, report.asked
    if any(row.tokens >= report.max_model_len for row in report.rows):
        return ""
    if gpus := gpus_needed(report):
        return f"The weights alone do not fit: try --tensor-parallel-size {gpus}."
    if asked.kv_cache is not None:
        return (
            "Not one request of that length fits: give a larger --kv-cache-memory-bytes or leave it out, a shorter "
            "--max-model-len, or a larger --tensor-parallel-size."
        )
    if budget is not None and budget.cache <= 0:
        taken = (budget.weights or 0) + budget.dictionary + budget.allowance
        return (
            f"Nothing is left for a cache: weights, dictionary and what vLLM works with take {_gib(taken)} of "
            f"{_gib(int(budget.total * asked.utilization))}. It needs GPUs with more memory, or more of them."
        )
    return (
        "Not one request of that length fits: give a shorter --max-model-len, a larger --tensor-parallel-size, or GPUs "
        "with more memory."
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
