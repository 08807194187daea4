"""Write the table of models into the README: what is coded of each, what a token takes, whether it was tried.

    python benchmarks/family_table.py            # replaces what is between the two marks in README.md
    python benchmarks/family_table.py --print    # to standard output

Models are those of tests/check/configurations.py, which the tests of `vllm-lexico check` read; where they ran is said
in tests/check/tried.py. Bytes are counted as `vllm-lexico check` counts them. Needs transformers and neither a GPU nor
vLLM; takes some seconds.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.record import ROOT

from vllm_lexico.check import memory, verdict
from vllm_lexico.check.memory import Load
from vllm_lexico.check.model import ModelShape, read_shape

START, END = "<!-- written by benchmarks/family_table.py -->", "<!-- end of the table -->"
CONTEXTS = (32768, 131072)
HELD, RESERVED = 1, 8192  # tokens of a step: of a decoding request; of `vllm serve` on a GPU of 80 to 160 GiB
HEAD = (
    "| model | head size | layers coded | held at 32k | held at 128k | reserved | state |",
    "|---|---|---|---|---|---|---|",
)


def main() -> None:
    """Write the table, or print it."""
    parser = argparse.ArgumentParser(description="Write the table of models into the README.")
    parser.add_argument("--print", action="store_true", help="print it and change nothing")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="file with the marks (README.md)")
    args = parser.parse_args()
    table = make_table()
    if args.print:
        print(table)
        return
    text = args.readme.read_text(encoding="utf-8")
    args.readme.write_text(replaced(text, table), encoding="utf-8")
    print(args.readme)


def replaced(text: str, table: str, start_mark: str = START, end_mark: str = END) -> str:
    """A page with the table between its marks.

    Raises:
        ValueError: it has not one of each mark, the first before the second.
    """
    before, start, rest = text.partition(start_mark)
    _, end, after = rest.partition(end_mark)
    if not (start and end) or start_mark in rest or end_mark in before + after:
        words = f"one {start_mark} and one {end_mark} after it"
        raise ValueError(f"the page was given without {words}; put them around the table")
    return f"{before}{start_mark}\n{table}\n{end_mark}{after}"


def make_table() -> str:
    """The table in Markdown, without a line's end after it."""
    tests = ROOT / "tests" / "check"
    configurations = runpy.run_path(str(tests / "configurations.py"))["FAMILIES"]
    known = runpy.run_path(str(tests / "tried.py"))["MODELS"]
    with tempfile.TemporaryDirectory() as folder:
        rows = [row(name, Path(folder), configurations[name], known[name]) for name in known]
    return "\n".join([*HEAD, *rows])


def row(name: str, folder: Path, configuration: dict[str, Any], known: Any) -> str:
    """A model's line.

    Args:
        name: of the model.
        folder: to write its configuration into.
        configuration: config.json of the model.
        known: of tests/check/tried.py.

    Raises:
        ValueError: what is known says that the model is refused and the check that it is served, or the reverse.
    """
    (folder / "config.json").write_text(json.dumps(configuration), encoding="utf-8")
    shape = read_shape(name, str(folder))
    reasons = verdict.reasons_against(shape, shape.longest)
    if bool(reasons) != bool(known.refused):
        raise ValueError(
            f"{name} was given as refused for {known.refused!r}, the check says {reasons}; change tests/check/tried.py"
        )
    size = "–" if getattr(shape.text, "kv_lora_rank", None) else str(shape.heads.size)
    if known.refused:
        cells = [name, size, "–", "–", "–", "–", f"refused: {known.refused}"]
    else:
        held = [in_words(shape, length, asked) for length, asked in zip(lengths_of(shape), CONTEXTS, strict=False)]
        coded, plain = request_bytes(shape, lengths_of(shape)[-1], RESERVED)
        held += ["–"] * (len(CONTEXTS) - len(held))
        coded_layers = f"{len(shape.coded)} of {shape.num_layers}"
        cells = [name, size, coded_layers, *held, f"{coded / plain:.2f}", state(known)]
    return f"| {' | '.join(cells)} |"


def state(known: Any) -> str:
    """Where a model was tried, in words."""
    places = [*(["CPU"] if known.engine else []), *([known.gpu] if known.gpu else [])]
    return f"tried: {', '.join(places)}" if places else "fits"


def lengths_of(shape: ModelShape) -> list[int]:
    """CONTEXTS, ending with the longest that the model has."""
    return list(dict.fromkeys(min(length, shape.longest) for length in CONTEXTS))


def in_words(shape: ModelShape, length: int, asked: int) -> str:
    """Bytes per token that a decoding request of a length holds, and of bf16's; the length where another was asked."""
    coded, plain = request_bytes(shape, length, HELD)
    end = "" if length == asked else f" at {length / 1024:.0f}k"
    return f"{coded / plain:.2f} ({coded / length:,.0f}){end}"


def request_bytes(shape: ModelShape, length: int, step_tokens: int) -> tuple[int, int]:
    """Bytes that a request of a length takes in all layers, with LEXICO at its default sparsity and without it.

    Args:
        shape: of the model.
        length: tokens of the request.
        step_tokens: that may be computed at a time.
    """
    load = Load(length, step_tokens)
    coded = memory.coded_plan(shape, memory.SETTINGS.sparsity.key, load)
    return coded.request_bytes, memory.plain_plan(shape, load).request_bytes


if __name__ == "__main__":
    main()
