"""Evaluation text cut into windows of tokens, one after the other and none twice.

Where a model's requests begin with a token of their own (BOS), each window does too.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Row = TypeVar("Row")


def wikitext_windows(path: Path, tokenizer: Any, length: int = 2048, count: int | None = None) -> Tensor:
    """Cut a text file (.txt or .txt.xz), tokenised as one, into windows.

    Args:
        path: the file.
        tokenizer: of transformers; where it puts a token before a text, that is the first of every window.
        length: tokens per window, that one included.
        count: windows, the first ones; all that the text fills if None.

    Returns:
        int64 [count, length] token ids.

    Raises:
        ValueError: the text fills fewer, or the file has no text.
    """
    return _cut(read_text(path), path, tokenizer, length, count)


def jsonl_windows(path: Path, tokenizer: Any, length: int = 2048, count: int | None = None) -> Tensor:
    """As `wikitext_windows`, of JSON rows (.jsonl or .jsonl.xz) with "question" and "answer", or "text"."""
    return _cut("\n\n".join(read_rows(path, _row_text)), path, tokenizer, length, count)


def read_rows(path: Path, read: Callable[[Any], Row]) -> list[Row]:
    """Read JSON text, one value per line (.jsonl or .jsonl.xz).

    Args:
        path: the file.
        read: makes a row of a line's value; raises ValueError, KeyError or TypeError where it is none.

    Raises:
        ValueError: the file is not there, or a line is no row.
    """
    try:
        return [read(json.loads(line)) for line in read_text(path).split("\n") if line.strip()]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read ({str(error)[:200]!r}); allowed: one JSON object per line, of texts named "
            f'"question" and "answer", or "text"; correct it, or name another folder with --data'
        ) from error


def texts_of(row: Any, *names: str) -> list[str]:
    """Fields of a row that are texts; ValueError, KeyError or TypeError where one is not."""
    texts = [row[name] for name in names]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"{' or '.join(names)} is no text")
    "".join(texts).encode()  # half of a pair of surrogates is no text either
    return texts


def list_of_texts(values: Any) -> list[str]:
    """A list that has texts alone; ValueError, KeyError or TypeError where it is none."""
    if not isinstance(values, list):
        raise TypeError("a field is no list")
    named = {str(i): value for i, value in enumerate(values)}
    return texts_of(named, *named)


def _row_text(row: Any) -> str:
    if "question" in row:
        question, answer = texts_of(row, "question", "answer")
        return f"Question: {question}\nAnswer: {answer}"
    return texts_of(row, "text")[0]


def read_text(path: Path) -> str:
    """The text of a file, which may be in .xz; ValueError where there is none."""
    if not path.is_file():
        raise ValueError(f"there is no text file {path}; name the folder that has it")
    try:
        content = path.read_bytes()
        return (lzma.decompress(content) if path.suffix == ".xz" else content).decode()
    except (lzma.LZMAError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); allowed: UTF-8 text, or that in .xz; fetch it again"
        ) from error


def _cut(text: str, path: Path, tokenizer: Any, length: int, count: int | None) -> Tensor:
    ids = tokenizer(text, verbose=False)["input_ids"]
    first = ids[:1] if adds_bos(tokenizer) else []
    ids, room = torch.tensor(ids[len(first) :], dtype=torch.int64), length - len(first)
    full = len(ids) // room if room > 0 else 0
    wanted = full if count is None else count
    if not 1 <= wanted <= full:
        raise ValueError(
            f"{path} fills {full} windows of {length} tokens, asked for were {wanted}; allowed: 1 to as many as it "
            f"fills; ask for fewer or shorter ones"
        )
    rows = ids[: wanted * room].view(wanted, room)
    return torch.cat((torch.tensor(first, dtype=torch.int64).expand(wanted, -1), rows), 1)


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts its first token (BOS) before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][0] == bos
