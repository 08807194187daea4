"""Draw the pictures of the README and the docs: diagrams from `CodeLayout` and the serving code, curves from results.

    python benchmarks/pictures.py                        # all seven, into docs/pictures
    python benchmarks/pictures.py frontier decode        # some

Needs matplotlib and neither a GPU nor vLLM; takes a few seconds. A curve shows the newest row of each case and GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench import curves, diagrams
from bench.record import RESULTS, ROOT

from vllm_lexico.dictionary.picture import DOTS_PER_INCH, LOOKS

COLOURS = 64  # of a picture's palette
# By name: the figure's size in inches and what draws it.
PICTURES: dict[str, tuple[tuple[float, float], Callable[[Any, Path], None]]] = {
    "pages": ((11.0, 5.6), diagrams.draw_pages),
    "journey": ((11.0, 3.4), diagrams.draw_journey),
    "step": ((11.0, 4.6), diagrams.draw_step),
    "decode": ((7.4, 4.6), curves.draw_decode),
    "answers": ((7.4, 4.6), curves.draw_answers),
    "frontier": ((11.6, 4.0), curves.draw_frontier),
    "quality_frontier": ((11.6, 7.0), curves.draw_documents),
}


def main() -> None:
    """Draw the pictures that are named, or all."""
    parser = argparse.ArgumentParser(description="Draw the pictures of the README and the docs.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)} (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder (default: docs/pictures)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="rows to draw (default: benchmarks/results)")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in PICTURES]:
        parser.error(f"no picture {', '.join(unknown)}; known are {', '.join(PICTURES)}")
    for name in args.names or PICTURES:
        draw(name, args.out / f"{name}.png", args.results)
        print(args.out / f"{name}.png")


def draw(name: str, path: Path, results: Path) -> None:
    """Draw one picture.

    Args:
        name: of PICTURES.
        path: of the PNG to write.
        results: folder of rows.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from PIL import Image

    size, fill = PICTURES[name]
    with rc_context(LOOKS):
        figure = Figure(figsize=size, layout="constrained")
        fill(figure, results)
        drawn = BytesIO()
        figure.savefig(drawn, dpi=DOTS_PER_INCH)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.open(drawn).convert("RGB").quantize(COLOURS).save(path, optimize=True)  # a third of the bytes


if __name__ == "__main__":
    main()
