"""Real text for those who have none: some that comes with the package, and the code of Python's standard library.

A model's own text is not all that it will serve: a dictionary of it alone loses more on real text. `dictionaries/`
has the file of text, whose rows name their source and licence.
"""

import hashlib
import json
import lzma
import sysconfig
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from vllm_lexico.dictionary.search import bundled_folder
from vllm_lexico.train.texts import TextSequences

FILE = "text.jsonl.xz"  # of the bundled folder
CODE_FOLDERS = (
    "",
    "asyncio",
    "concurrent/futures",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "unittest",
    "xml/dom",
)
# Of a kind among the others, where not 1: so all kinds lose about as much as from real text alone (docs/log.md).
TURNS = {"books": 2, "code": 2, "math": 2}
SMALLEST, LARGEST = 4_000, 100_000  # bytes of a file of code: neither stubs nor tables


@lru_cache(1)
def package_documents() -> dict[str, list[str]]:
    """Texts by kind; {} where they were not installed."""
    path = bundled_folder() / FILE
    if not path.is_file():
        return {}
    kinds: dict[str, list[str]] = {}
    for line in lzma.decompress(path.read_bytes()).decode().rstrip("\n").split("\n"):
        row = json.loads(line)
        kinds.setdefault(row["kind"], []).append(row["text"])
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for name in CODE_FOLDERS for file in sorted((folder / name).glob("*.py"))]
    code = [
        file.read_text(encoding="utf-8", errors="replace")
        for file in files
        if SMALLEST <= file.stat().st_size <= LARGEST
    ]
    return kinds | ({"python": code} if code else {})


def package_text_identity() -> str:
    """SHA-256 of all of it, which the version of Python decides too."""
    digest = hashlib.sha256()
    for kind, texts in package_documents().items():
        digest.update("\0".join((kind, *texts)).encode())
    return digest.hexdigest()


def package_sequences(tokenizer: Any, length: int, seed: int) -> TextSequences:
    """It as sequences of token ids, each kind counting the same but for TURNS; see `TextSequences`."""
    documents: dict[str, list[str]] = {}
    for kind, texts in package_documents().items():
        turns = TURNS.get(kind, 1)
        documents |= {f"{kind} {turn}": texts[turn::turns] for turn in range(turns)}
    return TextSequences((), tokenizer, length, seed, documents=documents)


class PackageRows:
    """Rows of it for the rounds of a run, a part of one text for each: no piece comes again before all were read.

    Args:
        tokenizer: of transformers.
        length: tokens per row.
        seed: of places and order.
        rounds: of the run.
    """

    def __init__(self, tokenizer: Any, length: int, seed: int, rounds: int) -> None:
        self.sequences, self.rounds = package_sequences(tokenizer, length, seed), rounds
        self._rows: torch.Tensor | None = None

    def take(self, count: int, number: int | None) -> torch.Tensor:
        """int64 [count, length]: those of round `number`, of which each has as many; the held-out ones for None."""
        if number is None:
            return self.sequences.take(count, None)
        if self._rows is None:
            self._rows = self.sequences.take(count * self.rounds, 0)
        return self._rows[number * count : (number + 1) * count]


def mixed(own: torch.Tensor, other: torch.Tensor, seed: int) -> torch.Tensor:
    """Rows of two texts, int64 [m, length] and [n, length], in a random order."""
    rows = torch.cat((own, other))
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
