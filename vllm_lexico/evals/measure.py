"""A figure of a task, as its samples gave it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = ("share", "mean", "perplexity")


@dataclass(frozen=True)
class Measure:
    """One figure of a task.

    name: what results call it.
    kind: "share" (values are 0 or 1), "mean", or "perplexity" (values are losses in nats per token; the figure is exp
        of their mean).
    values: one number per sample, by the sample's id, which is the same for every cache.
    clusters: samples that stand or fall together, by id; each is alone where it is missing.
    case: words that tell this figure from others of its name, as the length of a text.
    """

    name: str
    kind: str
    values: Mapping[Hashable, float]
    clusters: Mapping[Hashable, Hashable] = field(default_factory=dict)
    case: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind
