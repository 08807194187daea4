"""What a result belongs to: model, weights, settings, data, dictionary and versions. Other ones are never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from vllm_lexico import __version__
from vllm_lexico.config import TRAIN
from vllm_lexico.evals.caches import Cache
from vllm_lexico.evals.fields import Fields, Printable
from vllm_lexico.evals.settings import EvalSettings
from vllm_lexico.evals.tasks import TASKS
from vllm_lexico.train.identity import MODEL_SUFFIXES, file_checksum
from vllm_lexico.versions import VLLM, version

# Engine arguments that decide where and how fast it runs, not what comes out: a run may go on with others.
FREE_ENGINE = ("gpu_memory_utilization", "kv_cache_memory_bytes")
SAMPLE_BYTES = 1 << 20
# None where it was not known; then it is not compared.
UNKNOWN_AT_FIRST = ("weights", "dictionary")


class CacheFields(Fields):
    """A cache: the fields of `Cache`, and no other."""

    model_config = ConfigDict(extra="forbid")
    name: Printable
    engine: dict[str, Any]


class Identity(Fields):
    """What a result of one cache and task belongs to, as the result's file says it.

    model: as the user named it.
    weights: of the model, see `weights_of`.
    dictionary: checksum of LEXICO's file.
    data: checksums of the files that the task reads, by name.
    engine: arguments that all caches share, but for FREE_ENGINE.
    settings: of the task.
    """

    model: Printable
    weights: Printable | None
    dictionary: Printable | None
    cache: CacheFields
    task: Printable
    settings: dict[Printable, Any]
    data: dict[Printable, Printable]
    engine: dict[Printable, Any]
    versions: dict[Printable, Printable | None]


def identities(settings: EvalSettings, cache: Cache, tasks: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What the results of a cache that are to be made will belong to, by task."""
    values = settings.to_json()
    shared = {
        "model": settings.model,
        "weights": weights_of(settings.model, values["engine"].get("revision")),
        "dictionary": dictionary_of(cache),
        "cache": json.loads(json.dumps(asdict(cache))),
        "engine": {name: value for name, value in values["engine"].items() if name not in FREE_ENGINE},
        "versions": versions(),
    }
    folder = Path(settings.data)
    return {
        task: shared
        | {
            "task": task,
            "settings": values[task],
            "data": {f: file_checksum(folder / f) for f in TASKS[task].DATA_FILES},
        }
        for task in tasks
    }


def versions() -> dict[str, str | None]:
    """What results depend on: vLLM, torch, the harness and this package; None for what is not installed."""
    return {
        "vllm_lexico": __version__,
        "vllm": version(*VLLM),
        "torch": version("torch"),
        "lm_eval": version("lm_eval"),
    }


def weights_of(model: str, revision: str | None = None) -> str | None:
    """Which weights a model's name stands for; None for a model of the hub that is not on this machine yet.

    Of the hub it is the commit. Of a folder or file it is a checksum of names, sizes, and the first and last MiB of
    each file: other weights in the same place differ everywhere, and a model may have hundreds of GiB.
    """
    path = Path(model)
    if not path.exists():
        return _commit_of(model, revision)
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        if file.is_file() and file.suffix in MODEL_SUFFIXES:
            size = file.stat().st_size
            digest.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as opened:
                digest.update(opened.read(SAMPLE_BYTES))
                opened.seek(max(size - SAMPLE_BYTES, 0))
                digest.update(opened.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _commit_of(model: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:  # no name that the hub could have; vLLM will say so
        return None
    return Path(found).parent.name if isinstance(found, str) else None


def dictionary_of(cache: Cache) -> str | None:
    """Checksum of the dictionary file that a cache of LEXICO names; None where it names none, or one of the hub."""
    named = cache.dictionary
    if named is None or named == TRAIN:
        return None
    path = Path(named).expanduser()
    return file_checksum(path) if path.is_file() else None


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what a result belongs to that those to be made now do not share with it.

    Args:
        before, now: identities. Facts of a cache or a task are compared where both are of the same one.
    """
    return [
        f"{name} was {old!r}, now is {new!r}"
        for name, old, new in _compared(before, now)
        if old != new and not (name in UNKNOWN_AT_FIRST and None in (old, new))
    ]


def _compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Names of facts, and both values of each."""
    same_task = before["task"] == now["task"]
    old_cache, new_cache = Cache(**before["cache"]), Cache(**now["cache"])
    same_cache = old_cache.folder.lower() == new_cache.folder.lower()
    for name in ["model", "weights", *(["dictionary"] if same_cache else [])]:
        yield name, before[name], now[name]
    parts = [(f"{part} ", before[part], now[part]) for part in ("versions", "engine")]
    if same_task:
        parts += [(f"{now['task']} ", before[part], now[part]) for part in ("settings", "data")]
    if same_cache:
        yield "cache", old_cache.name, new_cache.name
        parts += [(f"{new_cache.name} ", old_cache.engine, new_cache.engine)]
    for where, old, new in parts:
        for name in sorted({*old, *new}):
            yield f"{where}{name}", old.get(name), new.get(name)
