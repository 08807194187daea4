"""Evaluation text cut into windows of tokens, one after the other and none twice."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def wikitext_windows(path: Path, tokenizer: Any, length: int = 2048, count: int | None = None) -> Tensor:
    """int64 [count, length]: a text file (.txt or .txt.xz), tokenised as one.

    count: windows, the first ones; all that the text fills if None. ValueError when it fills fewer, or is no text.
    """
    return _cut(_read(path), path, tokenizer, length, count)


def jsonl_windows(path: Path, tokenizer: Any, length: int = 2048, count: int | None = None) -> Tensor:
    """As `wikitext_windows`, of JSON rows (.jsonl or .jsonl.xz) with "question" and "answer", or "text"."""
    try:
        rows = [_row_text(json.loads(line)) for line in _read(path).split("\n") if line.strip()]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} cannot be read ({error!r}); allowed: a JSON object a line with "question" and "answer", or '
            f'"text"; mend it or name another'
        ) from error
    return _cut("\n\n".join(rows), path, tokenizer, length, count)


def _row_text(row: dict[str, str]) -> str:
    return f"Question: {row['question']}\nAnswer: {row['answer']}" if "question" in row else row["text"]


def _read(path: Path) -> str:
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
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    full = len(ids) // length
    wanted = full if count is None else count
    if not 1 <= wanted <= full:
        raise ValueError(
            f"{path} fills {full} windows of {length} tokens, asked for were {wanted}; allowed: 1 to as many as it "
            f"fills; ask for fewer or shorter ones"
        )
    return ids[: wanted * length].view(wanted, length)
