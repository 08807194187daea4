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
from vllm_lexico.evals.settings import ENGINE_FLAGS, OTHER_ENGINE_FLAG, TASK_FLAGS, EvalSettings
from vllm_lexico.evals.tasks import TASKS
from vllm_lexico.train.identity import MODEL_SUFFIXES, file_checksum
from vllm_lexico.versions import VLLM, version

# Engine arguments that decide where and how fast it runs, not what comes out: a run may go on with others.
FREE_ENGINE = ("gpu_memory_utilization", "kv_cache_memory_bytes")
# Flags without a value, and with several.
SWITCHES, SIZES = ("--enforce-eager",), ("--qa-passages", "--pairs", "--needle-lengths")
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
    """In words, what a result belongs to that those to be made now do not share with it, by the flags that set it.

    Args:
        before, now: identities. Facts of a cache or a task are compared where both are of the same one.
    """
    return [
        f"{name} was {_words(name, old)}, now is {_words(name, new)}"
        for name, old, new in _compared(before, now)
        if old != new and not (name in UNKNOWN_AT_FIRST and None in (old, new))
    ]


def _words(name: str, value: Any) -> str:
    """A value as it was typed, where the name is a flag's."""
    if name in SWITCHES and value is True:
        return "given"
    if name in SIZES and isinstance(value, list):
        return " ".join(map(str, value))
    return "left out" if value is None and "--" in name else repr(value)


def _compared(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Names of facts, flags where they have one, and both values of each."""
    task, same_task = now["task"], before["task"] == now["task"]
    old_cache, new_cache = Cache(**before["cache"]), Cache(**now["cache"])
    same_cache = old_cache.folder.lower() == new_cache.folder.lower()
    yield "MODEL", before["model"], now["model"]
    for name in ["weights", *(["dictionary"] if same_cache else [])]:
        yield name, before[name], now[name]
    named = [(f"versions {name}", old, new) for name, old, new in _pairs(before["versions"], now["versions"])]
    for name, old, new in _pairs(before["engine"], now["engine"]):
        named.append((ENGINE_FLAGS.get(name, f"{OTHER_ENGINE_FLAG} {name}"), old, new))
    if same_task:
        flags = TASK_FLAGS[task]
        for name, old, new in _pairs(before["settings"], now["settings"]):
            named.append((flags.get(name, f"{task} {name}"), old, new))
        named += [(f"{task} {name}", old, new) for name, old, new in _pairs(before["data"], now["data"])]
    if same_cache:
        named.append(("cache", old_cache.name, new_cache.name))
        named.append((f"{new_cache.name} --dictionary", old_cache.dictionary, new_cache.dictionary))
        engines = old_cache.engine_without_dictionary, new_cache.engine_without_dictionary
        named += [(f"{new_cache.name} {name}", old, new) for name, old, new in _pairs(*engines)]
    yield from named


def _pairs(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Names that either has, and both values; None for what one lacks."""
    for name in sorted({*before, *now}):
        yield name, before.get(name), now.get(name)
