"""The folder of an evaluation: who may write in it, and which of its results a run may keep."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vllm_lexico.evals.caches import Cache
from vllm_lexico.evals.fields import Fields, Printable
from vllm_lexico.evals.identity import CacheFields, differences
from vllm_lexico.evals.prediction_files import Result, read_result, result_path
from vllm_lexico.evals.sealed import read_sealed, write_sealed
from vllm_lexico.evals.tasks import TASKS

LOCK_FILE, CONFIG_FILE, CACHE_FILE = ".lock", "config.json", "cache.json"


class Config(Fields):
    """What an evaluation's results have in common. tasks: their settings."""

    model: Printable
    engine: dict[Printable, Any]
    versions: dict[Printable, Printable | None]
    tasks: dict[Printable, dict[str, Any]]


@dataclass(frozen=True)
class CacheFolder:
    """What a cache's folder has. results: finished tasks; damaged: tasks whose files cannot be trusted, and why."""

    cache: Cache
    path: Path
    results: Mapping[str, Result]
    damaged: Mapping[str, str]


def check_out(out: Path) -> None:
    """Refuse a file, or a folder that would lie in one; ValueError in one sentence."""
    there = next((path for path in (out, *out.parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        where = "is a file" if there == out else f"would lie in {there}, which is a file"
        raise ValueError(f"--out {out} {where}; allowed: a folder, which may be missing; give another")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Hold the lock of a folder, which goes with this process, however that ends; ValueError where another has it."""
    check_out(out)
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK_FILE)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"another evaluation is running in {out}; allowed: one at a time; wait for its end, or give another --out"
        ) from None
    try:
        yield
    finally:
        lock.release()


def read_folders(out: Path) -> list[CacheFolder]:
    """All caches that the folder knows; one that says neither its name nor has a result is passed over with a note."""
    found = []
    names = [CACHE_FILE, *(result_path(Path(), task).name for task in TASKS)]
    for path in sorted({path.parent for name in names for path in out.glob(f"*/{name}")}):
        results: dict[str, Result] = {}
        damaged: dict[str, str] = {}
        for task in TASKS:
            try:
                result = read_result(path, task)
            except ValueError as error:
                damaged[task] = str(error)
                continue
            if result is not None:
                results[task] = result
        try:
            cache = next((each.cache for each in results.values()), None) or _read_cache(path)
        except ValueError as error:
            print(f"vllm-lexico: {path} is passed over: {error}", file=sys.stderr)
            continue
        found.append(CacheFolder(cache, path, results, damaged))
    return found


def settle(out: Path, identities: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, tuple[str, ...]]:
    """Find what is to be run, and write what the folder's results have in common.

    Results of tasks and caches that are not asked for are left as they are; they need the same model, engine and
    versions. Damaged results that are asked for are run again.

    Args:
        out: the folder; this process holds its lock.
        identities: of the results asked for, by the cache's name and the task's.

    Returns:
        Names of the tasks to run, by the cache's name.

    Raises:
        ValueError: results in the folder belong to another model, or to other settings, data or versions.
    """
    folders = {folder.path.name: folder for folder in read_folders(out)}
    _check_same(out, list(folders.values()), identities)
    missing: dict[str, tuple[str, ...]] = {}
    for name, by_task in identities.items():
        cache = Cache(**next(iter(by_task.values()))["cache"])
        folder = folders.get(cache.folder)
        results, damaged = (folder.results, folder.damaged) if folder else ({}, {})
        for task in set(damaged) & set(by_task):
            print(f"vllm-lexico: {damaged[task]}; it runs again now", file=sys.stderr)
        missing[name] = tuple(task for task in by_task if task not in results)
        write_cache(out, cache)
    now = [identity for by_task in identities.values() for identity in by_task.values()]
    before = [result.identity for folder in folders.values() for result in folder.results.values()]
    write_sealed(
        out / CONFIG_FILE,
        {name: now[0][name] for name in ("model", "engine", "versions")}
        | {"tasks": {identity["task"]: identity["settings"] for identity in before + now}},
    )
    return missing


def _check_same(
    out: Path, folders: Sequence[CacheFolder], identities: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> None:
    now = [identity for by_task in identities.values() for identity in by_task.values()]
    for result in (result for folder in folders for result in folder.results.values()):
        differing = [words for identity in now for words in differences(result.identity, identity)]
        if differing:
            raise ValueError(
                f"{out} has results of another configuration: {'; '.join(dict.fromkeys(differing))}; allowed: the same "
                f"one; give another --out, or what the results were made with"
            )


def write_cache(out: Path, cache: Cache) -> None:
    """Say in a cache's folder which it is."""
    write_sealed(out / cache.folder / CACHE_FILE, asdict(cache))


def _read_cache(folder: Path) -> Cache:
    values = read_sealed(folder / CACHE_FILE, CacheFields)
    cache = Cache(values["name"], values["engine"])
    if cache.folder != folder.name:
        raise ValueError(f"{folder / CACHE_FILE} belongs elsewhere: to {cache.folder}")
    return cache


def read_config(out: Path) -> dict[str, Any]:
    """What `settle` wrote; see `Config`."""
    return read_sealed(out / CONFIG_FILE, Config)


def missing_tasks(folder: Path, tasks: Sequence[str]) -> tuple[str, ...]:
    """Tasks that have no result in a cache's folder, as far as names of files tell."""
    return tuple(task for task in tasks if not result_path(folder, task).exists())
