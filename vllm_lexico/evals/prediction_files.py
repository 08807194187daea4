"""The two files of a finished task: TASK.jsonl has the predictions, TASK.json says of them what they belong to.

TASK.json is written last, with the checksum of the other and its own, so a task without a whole pair is not finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lexico_kernels.files import write_whole
from pydantic import Field

from vllm_lexico.evals.caches import Cache
from vllm_lexico.evals.fields import Amount, Count, Fields, Printable, Size
from vllm_lexico.evals.identity import Identity
from vllm_lexico.evals.sealed import check, checksum, parse, read_bytes, read_sealed, write_sealed
from vllm_lexico.evals.tasks import TASKS

AGAIN = "run the same command again, which makes this result anew"


class HeldFields(Fields):
    """What sequences held, as `summarize_held` says it; None where there were none, and in files without it."""

    sequences: Count
    tokens: Amount | None
    bytes: Amount | None
    bytes_per_token: Amount | None
    plain_bytes_per_token: Amount | None = None


class About(Fields):
    """What TASK.json says beside the checksums.

    rows: predictions; held: by case, "all" of them among it; notes: what a user has to know.
    """

    identity: Identity
    rows: Count
    rows_sha256: Printable
    seconds: Amount
    start_seconds: Amount
    token_bytes: Size
    plain_token_bytes: Size
    capacity_tokens: Count
    held: dict[Printable, HeldFields]
    notes: list[Printable] = Field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """A finished task of one cache. about: what `About` names; rows: the predictions."""

    about: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @property
    def identity(self) -> Mapping[str, Any]:
        """What it belongs to, see `Identity`."""
        return self.about["identity"]

    @property
    def cache(self) -> Cache:
        """The cache that it is of."""
        return Cache(**self.identity["cache"])


def result_path(folder: Path, task: str) -> Path:
    """The file of a cache's folder that says that a task is finished."""
    return folder / f"{task}.json"


def rows_path(folder: Path, task: str) -> Path:
    """The file of a cache's folder with a task's predictions."""
    return folder / f"{task}.jsonl"


def error_path(folder: Path, task: str) -> Path:
    """The file of a cache's folder that says why a task failed."""
    return folder / f"{task}.error"


def write_result(folder: Path, task: str, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a task's predictions, then what is known of them.

    Args:
        folder: of the cache.
        task: its name.
        about: the fields of `About` but for `rows` and `rows_sha256`.
        rows: predictions, each with the fields that the type ROWS of the task names.

    Raises:
        ValueError: a prediction or a field is not what it must be, as a loss that is no number.
        OSError: a file cannot be written.
    """
    try:
        content = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode()
    except ValueError as error:
        raise ValueError(f"a prediction of {task} cannot be kept ({error})") from error
    path = result_path(folder, task)
    values = {**about, "rows": len(rows), "rows_sha256": checksum(content)}
    _check_rows(rows, task, rows_path(folder, task))
    check(values, About, path)
    write_whole(rows_path(folder, task), content)
    write_sealed(path, values)


def read_result(folder: Path, task: str) -> Result | None:
    """Read a task's result; None where the task is not finished.

    Raises:
        ValueError: a file is cut short, damaged, or belongs to another cache or task.
    """
    path = result_path(folder, task)
    if not path.exists():
        return None
    try:
        about = read_sealed(path, About)
        _check_place(about, folder, task, path)
        content = read_bytes(rows_path(folder, task))
        if checksum(content) != about["rows_sha256"]:
            raise ValueError(f"{rows_path(folder, task)} is damaged: its checksum is not the one that {path.name} has")
        rows = [parse(line, rows_path(folder, task)) for line in content.split(b"\n") if line]
        _check_rows(rows, task, rows_path(folder, task))
        if len(rows) != about["rows"]:
            raise ValueError(f"{path} is damaged: it counts {about['rows']} predictions of {len(rows)}")
    except ValueError as error:
        raise ValueError(f"{error}; {AGAIN}") from error
    return Result(about, rows)


def _check_place(about: Mapping[str, Any], folder: Path, task: str, path: Path) -> None:
    identity = about["identity"]
    if identity["task"] != task or Cache(**identity["cache"]).folder != folder.name:
        raise ValueError(f"{path} belongs elsewhere: to {identity['task']} of {identity['cache']['name']}")
    if "all" not in about["held"]:
        raise ValueError(f"{path} is damaged: it does not say what all sequences held")


def _check_rows(rows: Sequence[Any], task: str, path: Path) -> None:
    if not rows:
        raise ValueError(f"{path} is damaged: it has no prediction")
    check(rows, TASKS[task].ROWS, path)
    if len({row["id"] for row in rows}) < len(rows):
        raise ValueError(f"{path} is damaged: two predictions have one id")
