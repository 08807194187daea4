"""The files that tasks read, made from public datasets of the Hugging Face hub where the user names no folder of them.

They are kept in the user's cache in the formats that `--data` takes, so that every run reads the same bytes.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lexico_kernels.files import cache_folder, write_whole

from vllm_lexico import hub
from vllm_lexico.evals.tasks import TASKS

FOLDER, ORIGINS = "eval", "sources.json"
REMEDY = "give --data the folder of the files that docs/quality.md names"
HEADING = re.compile(r"\s= [^=].* = \s*")  # of an article of WikiText; its sections have more signs


class Source(NamedTuple):
    """A file of a dataset. columns: that are read; make: the content of our file, of a row of them each."""

    repo: str
    file: str
    columns: tuple[str, ...]
    make: Callable[[Sequence[Sequence[str]]], str]


def _problems(rows: Sequence[Sequence[str]]) -> str:
    return _lines({"question": question, "answer": answer} for question, answer in rows)


def _text(rows: Sequence[Sequence[str]]) -> str:
    """Rows end with their own line breaks."""
    return "".join(text for (text,) in rows)


def _articles(rows: Sequence[Sequence[str]]) -> str:
    articles: list[list[str]] = []
    for (text,) in rows:
        if HEADING.fullmatch(text) or not articles:
            articles.append([])
        if text.strip():
            articles[-1].append(text.strip())
    return _lines({"text": "\n\n".join(article)} for article in articles if article)


def _lines(rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


GSM8K, WIKITEXT = "openai/gsm8k", "Salesforce/wikitext"
WIKITEXT_2 = "wikitext-2-raw-v1/{}-00000-of-00001.parquet"
SOURCES = {
    "gsm8k_test.jsonl.xz": Source(GSM8K, "main/test-00000-of-00001.parquet", ("question", "answer"), _problems),
    "gsm8k_train.jsonl.xz": Source(GSM8K, "main/train-00000-of-00001.parquet", ("question", "answer"), _problems),
    "wikitext2_raw_test.txt.xz": Source(WIKITEXT, WIKITEXT_2.format("test"), ("text",), _text),
    # Needles are hidden in any long text; these articles stand in for textbooks.
    "train_textbooks.jsonl.xz": Source(WIKITEXT, WIKITEXT_2.format("train"), ("text",), _articles),
}


def fetch_data(tasks: Sequence[str]) -> Path:
    """A folder with the files of these tasks, in the user's cache; what is missing there is fetched.

    Args:
        tasks: names of TASKS.

    Raises:
        ValueError: a dataset cannot be had, or what came is something else; one sentence that says what to do.
    """
    folder = cache_folder() / FOLDER
    needed = list(dict.fromkeys(file for task in tasks for file in TASKS[task].DATA_FILES))
    for file in (file for file in needed if not (folder / file).is_file()):
        source = SOURCES[file]
        print(f"vllm-lexico: {file} is made from {source.file} of the dataset {source.repo}", file=sys.stderr)
        path = hub.fetch(source.repo, source.file, kind="dataset", remedy=REMEDY)
        content = source.make(_read(path, source)).encode()
        _remember(folder, file, source, path)
        write_whole(folder / file, lzma.compress(content, preset=1))
    return folder


def _read(path: Path, source: Source) -> list[tuple[str, ...]]:
    """The rows of a parquet file, as texts of the columns that are wanted."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(
            f"files of datasets are read with pyarrow, which is not there ({error}); run `pip install pyarrow`, or "
            f"{REMEDY}"
        ) from error
    try:
        table = parquet.read_table(path, columns=list(source.columns))
        columns = [table.column(name).to_pylist() for name in source.columns]
    except (ArrowException, KeyError, OSError) as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{source.file} of the dataset {source.repo} cannot be read ({words}); delete {path} to fetch it again, or "
            f"{REMEDY}"
        ) from error
    rows = list(zip(*columns, strict=True))
    if not rows or not all(isinstance(text, str) for row in rows for text in row):
        raise ValueError(
            f"{source.file} of the dataset {source.repo} has no texts named {' and '.join(source.columns)}; {REMEDY}"
        )
    return rows


def _remember(folder: Path, file: str, source: Source, path: Path) -> None:
    """Write beside the files where each came from."""
    origins = folder / ORIGINS
    try:
        known = json.loads(origins.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    commit = re.search(r"/snapshots/([0-9a-f]+)/", path.as_posix())
    known[file] = {"dataset": source.repo, "file": source.file, "revision": commit[1] if commit else None}
    write_whole(origins, json.dumps(known, indent=1, sort_keys=True) + "\n")
