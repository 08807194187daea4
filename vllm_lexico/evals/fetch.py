"""The files that tasks read, made from public datasets of the Hugging Face hub where the user names no folder of them.

They are kept in the user's cache in the formats that `--data` takes, so that every run reads the same bytes.
"""

from __future__ import annotations

import json
import lzma
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from lexico_kernels.files import cache_folder, write_whole

from vllm_lexico import hub
from vllm_lexico.evals.tasks import TASKS
from vllm_lexico.evals.tasks.windows import list_of_texts

FOLDER, ORIGINS = "eval", "sources.json"
REMEDY = "give --data the folder of the files that docs/quality.md names"
HEADING = re.compile(r"\s= [^=].* = \s*")  # of an article of WikiText; its sections have more signs


class Source(NamedTuple):
    """Files of a dataset. columns: that are read; make: the content of our file, of a row of them each.

    as_texts: columns that have no texts themselves, and what makes a text of a value.
    """

    repo: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    make: Callable[[Sequence[Sequence[str]]], str]
    as_texts: Mapping[str, Callable[[Any], str]] = MappingProxyType({})


def _problems(rows: Sequence[Sequence[str]]) -> str:
    return _lines({"question": question, "answer": answer} for question, answer in rows)


def _passages(rows: Sequence[Sequence[str]]) -> str:
    """Rows of a question each; those of one passage come one after the other."""
    passages: dict[str, list[dict[str, Any]]] = {}
    for context, question, answers in rows:
        passages.setdefault(context, []).append({"question": question, "answers": json.loads(answers)})
    return _lines({"context": context, "qas": qas} for context, qas in passages.items())


def _programs(rows: Sequence[Sequence[str]]) -> str:
    """In the order of their numbers."""
    names = ("task_id", "text", "code", "test_list", "test_setup_code")
    problems = [
        dict(zip(names, (int(number), text, program, json.loads(tests), setup), strict=True))
        for number, text, program, tests, setup in rows
    ]
    return _lines(sorted(problems, key=lambda problem: problem["task_id"]))


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


def _number(value: Any) -> str:
    if not isinstance(value, int):
        raise TypeError("no number")
    return str(value)


def _texts(values: Any) -> str:
    """JSON of a list of texts, or of the texts of SQuAD's answers."""
    return json.dumps(list_of_texts(values["text"] if isinstance(values, dict) else values))


GSM8K, WIKITEXT = "openai/gsm8k", "Salesforce/wikitext"
WIKITEXT_2 = "wikitext-2-raw-v1/{}-00000-of-00001.parquet"
MBPP_SPLITS = tuple(f"full/{split}-00000-of-00001.parquet" for split in ("prompt", "test", "validation", "train"))
SOURCES = {
    "xquad_en.jsonl.xz": Source(
        "google/xquad",
        ("xquad.en/validation-00000-of-00001.parquet",),
        ("context", "question", "answers"),
        _passages,
        {"answers": _texts},
    ),
    "mbpp.jsonl.xz": Source(
        "google-research-datasets/mbpp",
        MBPP_SPLITS,
        ("task_id", "text", "code", "test_list", "test_setup_code"),
        _programs,
        {"task_id": _number, "test_list": _texts},
    ),
    "gsm8k_test.jsonl.xz": Source(GSM8K, ("main/test-00000-of-00001.parquet",), ("question", "answer"), _problems),
    "gsm8k_train.jsonl.xz": Source(GSM8K, ("main/train-00000-of-00001.parquet",), ("question", "answer"), _problems),
    "wikitext2_raw_test.txt.xz": Source(WIKITEXT, (WIKITEXT_2.format("test"),), ("text",), _text),
    # Needles are hidden in any long text; these articles stand in for textbooks.
    "train_textbooks.jsonl.xz": Source(WIKITEXT, (WIKITEXT_2.format("train"),), ("text",), _articles),
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
        names = ", ".join(source.files)
        print(f"vllm-lexico: {file} is made from {names} of the dataset {source.repo}", file=sys.stderr)
        paths = [hub.fetch(source.repo, name, kind="dataset", remedy=REMEDY) for name in source.files]
        rows = [row for path, name in zip(paths, source.files, strict=True) for row in _read(path, name, source)]
        content = source.make(rows).encode()
        _remember(folder, file, source, paths[0])
        write_whole(folder / file, lzma.compress(content, preset=1))
    return folder


def _read(path: Path, name: str, source: Source) -> list[tuple[str, ...]]:
    """The rows of a parquet file, as texts of the columns that are wanted. name: of the file in the dataset."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ValueError(
            f"files of datasets are read with pyarrow, which is not there ({error}); run `pip install pyarrow`, or "
            f"{REMEDY}"
        ) from error
    try:
        table = parquet.read_table(path, columns=list(source.columns))
        columns = [table.column(column).to_pylist() for column in source.columns]
    except (ArrowException, KeyError, OSError) as error:
        words = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} of the dataset {source.repo} cannot be read ({words}); delete {path} to fetch it again, or "
            f"{REMEDY}"
        ) from error
    try:
        for i, column in enumerate(source.columns):
            if column in source.as_texts:
                columns[i] = [source.as_texts[column](value) for value in columns[i]]
    except (ValueError, TypeError, KeyError):
        columns = []
    rows = list(zip(*columns, strict=True))
    if not rows or not all(isinstance(text, str) for row in rows for text in row):
        raise ValueError(
            f"{name} of the dataset {source.repo} has no texts named {' and '.join(source.columns)}; {REMEDY}"
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
    known[file] = {"dataset": source.repo, "file": ", ".join(source.files), "revision": commit[1] if commit else None}
    write_whole(origins, json.dumps(known, indent=1, sort_keys=True) + "\n")
