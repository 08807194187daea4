"""Texts that training holds out of a file, and those that it may read, as `train/texts.py` parts them."""

import json
import lzma
from pathlib import Path
from typing import Any

from vllm_lexico.train.texts import LONG_TEXT, TWENTY


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Rows of a .jsonl.xz that have text, each with its parts: lists of str `held_out` and `read`, one may be empty."""
    rows, count = [], 0
    for line in lzma.decompress(path.read_bytes()).decode().split("\n"):
        row = json.loads(line) if line.strip() else {"text": ""}
        if not row["text"].strip():
            continue
        parts = [row["text"][at : at + LONG_TEXT] for at in range(0, len(row["text"]), LONG_TEXT)]
        held = [(count + at) % TWENTY == 0 for at in range(len(parts))]
        count += len(parts)
        pairs = list(zip(parts, held, strict=True))
        rows.append(row | {"held_out": [text for text, is_held in pairs if is_held]})
        rows[-1]["read"] = [text for text, is_held in pairs if not is_held]
    return rows


def held_out_texts(path: Path, without: str) -> list[str]:
    """Those of a file, but of one source. without: its name."""
    return [text for row in rows_of(path) if row["source"] != without for text in row["held_out"]]
