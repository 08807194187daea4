"""What an evaluation is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_lexico.errors import check_whole_number, refusal

DEFAULT_TASKS = "gsm8k,wikitext,needle"
QUICK_CACHES = "lexico:15,bf16"
DEFAULT_CACHES = "lexico:15,lexico:11,lexico:7,bf16,fp8,turboquant_4bit_nc,turboquant_3bit_nc"


def _check(flag: str, value: int | None, low: int, high: int) -> None:
    if value is not None:
        check_whole_number(flag, value, low, high, "change it")


@dataclass(frozen=True)
class Gsm8kSettings:
    """GSM8K by lm-evaluation-harness.

    shots: worked problems before each.
    limit: the first so many problems, all 1,319 if None.
    """

    shots: int = 5
    limit: int | None = None

    def __post_init__(self) -> None:
        _check("--shots", self.shots, 0, 100)
        _check("--gsm8k-limit", self.limit, 1, 10**6)


@dataclass(frozen=True)
class WikitextSettings:
    """WikiText-2 perplexity.

    length: tokens per window.
    skip: first tokens of a window without a score.
    count: windows, as many as the text fills if None.
    chunk: tokens of a window that a step computes.
    """

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
    """Needles in textbooks.

    lengths: tokens of the whole sequence.
    samples: documents per kind and length.
    keys: needles in a document of several.
    seed: of what is hidden where.
    """

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

    def __post_init__(self) -> None:
        if not self.model or not self.model.isprintable():
            allowed = "a Hugging Face id or a folder, without control characters"
            raise ValueError(refusal("MODEL", self.model, allowed, "name one"))

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


# A first look, some minutes on one GPU: few questions, so that only what is broken shows.
QUICK = (
    Gsm8kSettings(limit=20),
    WikitextSettings(count=4),
    NeedleSettings(lengths=(4096,), samples=2),
)
