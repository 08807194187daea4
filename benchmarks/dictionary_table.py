"""Write the table of bundled dictionaries into dictionaries/README.md: what each is, loses, and does to its model.

    python benchmarks/dictionary_table.py            # replaces what is between the two marks
    python benchmarks/dictionary_table.py --print    # to standard output

What a dictionary is and loses is what its file says; perplexity is of the newest rows of `benchmarks/perplexity.py` and
`quality_study.py` for a file of that name, of codes as they are served: with gains, which older rows lack. Needs no GPU
and no vLLM; takes a second.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.record import RESULTS, ROOT
from family_table import replaced

from vllm_lexico.dictionary.file import load_dictionary

START, END = "<!-- written by benchmarks/dictionary_table.py -->", "<!-- end of the table -->"
TITLES = (
    "file, MB", "model", "coded layers × KV heads of size", "atoms", "energy lost at 15 atoms (keys, values)",
    "perplexity, times bf16's, at 15 and 7 atoms",
)  # fmt: skip
SPARSITIES = (15, 7)


def main() -> None:
    """Write the table, or print it."""
    parser = argparse.ArgumentParser(description="Write the table of bundled dictionaries.")
    parser.add_argument("--print", action="store_true", help="print it and change nothing")
    parser.add_argument("--readme", type=Path, default=ROOT / "dictionaries" / "README.md", help="file with the marks")
    args = parser.parse_args()
    table = make_table(ROOT / "dictionaries", RESULTS)
    if args.print:
        print(table)
        return
    args.readme.write_text(replaced(args.readme.read_text(encoding="utf-8"), table, START, END), encoding="utf-8")
    print(args.readme)


def make_table(folder: Path, results: Path) -> str:
    """The table in Markdown, without a line's end after it.

    Args:
        folder: of dictionaries.
        results: folder of rows.
    """
    perplexity = newest_perplexity([results / "dictionary.jsonl", results / "quality.jsonl"])
    return "\n".join(
        (
            _line(TITLES),
            "|---" * len(TITLES) + "|",
            *(_row(path, perplexity) for path in sorted(folder.glob("*.safetensors"))),
        )
    )


def newest_perplexity(files: Sequence[Path]) -> dict[tuple[str, int], float]:
    """(name of a dictionary's file, sparsity) -> perplexity over bf16's on WikiText-2. files: of rows; last wins."""
    newest = {}
    for line in (line for path in files if path.is_file() for line in path.read_text(encoding="utf-8").splitlines()):
        row = json.loads(line)
        case = row["case"]
        if row["metric"] == "perplexity_ratio" and case.get("text") == "wikitext" and case.get("gains"):
            given, file = case["sparsity"], case.get("dictionary_facts", {}).get("file", case["dictionary"])
            both = set(given.values()) if isinstance(given, dict) else {given}
            if len(both) == 1:
                newest[file, int(both.pop())] = row["value"]
    return newest


def _row(path: Path, perplexity: dict[tuple[str, int], float]) -> str:
    dictionary = load_dictionary(path)
    info = dictionary.info
    shape = info.fingerprint
    by_layer = [info.errors[kv]["15"] for kv in ("key", "value")]
    lost = ", ".join(f"{sum(values) / len(values):.4f}" for values in by_layer)
    ratios = [perplexity.get((path.name, sparsity)) for sparsity in SPARSITIES]
    words = ", ".join("no row" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
    cells = (
        f"{path.name}, {path.stat().st_size / 1e6:.1f}",
        info.model_name,
        f"{len(shape.layers)} × {shape.num_kv_heads} of {shape.head_dim}",
        f"{info.atoms:,} of {info.atom_bits} bits{', shared by heads' if dictionary.shared else ''}",
        lost,
        words,
    )
    return _line(cells)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
