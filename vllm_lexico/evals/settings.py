"""What an evaluation is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_lexico.errors import check_whole_number, refusal

DEFAULT_TASKS = "qa,pairs,code,gsm8k,wikitext,needle"
QUICK_CACHES = "lexico:15,bf16"
DEFAULT_CACHES = "lexico:15,lexico:11,lexico:7,bf16,fp8,turboquant_4bit_nc,turboquant_3bit_nc"

# Flags of the command line: of a task's settings, and of arguments of vLLM's engine; the rest of those have one flag.
TASK_FLAGS = {
    "qa": {"passages": "--qa-passages", "samples": "--qa-samples"},
    "pairs": {"pairs": "--pairs", "samples": "--pairs-samples"},
    "code": {"solved": "--code-solved", "samples": "--code-samples"},
    "gsm8k": {"shots": "--shots", "limit": "--gsm8k-limit"},
    "wikitext": {
        "length": "--wikitext-length",
        "skip": "--wikitext-skip",
        "count": "--wikitext-windows",
        "chunk": "--chunk-tokens",
    },
    "needle": {"lengths": "--needle-lengths", "samples": "--needle-samples", "keys": "--needle-keys"},
}
ENGINE_FLAGS = {
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "enforce_eager": "--enforce-eager",
}
OTHER_ENGINE_FLAG = "--engine-arguments"


def _check(flag: str, value: int | None, low: int, high: int) -> None:
    if value is not None:
        check_whole_number(flag, value, low, high, "change it")


def _check_sizes(flag: str, sizes: tuple[int, ...], high: int) -> None:
    for size in sizes:
        _check(flag, size, 1, high)
    if not sizes or len(set(sizes)) < len(sizes):
        raise ValueError(refusal(flag, " ".join(map(str, sizes)), "one size or several, each once", "change it"))


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
class QaSettings:
    """Questions about one of many passages.

    passages: in a context.
    samples: questions per number of passages.
    seed: of which are asked, and of what stands around their passage.
    """

    passages: tuple[int, ...] = (20, 60, 100)
    samples: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        _check_sizes("--qa-passages", self.passages, 240)
        _check("--qa-samples", self.samples, 1, 10**5)


@dataclass(frozen=True)
class PairsSettings:
    """The value of one of many random keys.

    pairs: of a key and a value, in a context.
    samples: questions per number of pairs.
    seed: of the pairs.
    """

    pairs: tuple[int, ...] = (75, 150)
    samples: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        _check_sizes("--pairs", self.pairs, 10**5)
        _check("--pairs-samples", self.samples, 1, 10**5)


@dataclass(frozen=True)
class CodeSettings:
    """Programs that are written after many others.

    solved: problems with their programs before each.
    samples: problems.
    seed: of which are asked, and of those before them.
    """

    solved: int = 50
    samples: int = 150
    seed: int = 0

    def __post_init__(self) -> None:
        _check("--code-solved", self.solved, 1, 400)
        _check("--code-samples", self.samples, 1, 500)


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
    qa: QaSettings = QaSettings()
    pairs: PairsSettings = PairsSettings()
    code: CodeSettings = CodeSettings()

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
        return cls(
            values["model"],
            values["data"],
            values["engine"],
            Gsm8kSettings(**values["gsm8k"]),
            WikitextSettings(**values["wikitext"]),
            NeedleSettings(**dict(values["needle"], lengths=tuple(values["needle"]["lengths"]))),
            QaSettings(**dict(values["qa"], passages=tuple(values["qa"]["passages"]))),
            PairsSettings(**dict(values["pairs"], pairs=tuple(values["pairs"]["pairs"]))),
            CodeSettings(**values["code"]),
        )


# A first look, some minutes on one GPU: few questions, so that only what is broken shows. By the task's name.
QUICK: dict[str, Any] = {
    "gsm8k": Gsm8kSettings(limit=20),
    "wikitext": WikitextSettings(count=4),
    "needle": NeedleSettings(lengths=(4096,), samples=2),
    "qa": QaSettings(passages=(20,), samples=20),
    "pairs": PairsSettings(pairs=(75,), samples=20),
    "code": CodeSettings(solved=20, samples=20),
}
