"""The evaluation tasks: one module each. TASKS lists them; importing them loads neither torch nor vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from vllm_lexico.errors import refusal
from vllm_lexico.evals.measure import Measure
from vllm_lexico.evals.settings import EvalSettings
from vllm_lexico.evals.tasks import code, gsm8k, needle, pairs, qa, wikitext

if TYPE_CHECKING:
    from vllm_lexico.evals.engine import Engine


class Task(Protocol):
    """What a task's module has.

    DATA_FILES: names of the files that it reads in the folder --data.
    NEEDS_HARNESS: whether it runs through lm-evaluation-harness's model.
    LEAVES_SIZES_OUT: whether it goes on with what an engine can read that reads less than `needed_tokens`.
    ROWS: type of a list of predictions; the fields that `measures` reads.
    """

    DATA_FILES: tuple[str, ...]
    NEEDS_HARNESS: bool
    LEAVES_SIZES_OUT: bool
    ROWS: Any

    def needed_tokens(self, settings: EvalSettings) -> int:
        """Tokens of the longest sequence that the task will make."""

    def run(self, engine: Engine, settings: EvalSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Run the task.

        Returns:
            One row per prediction, each with an "id" of its own, and lists of what sequences held: "all" of them, and
            those of each case.
        """

    def measures(
        self, rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None = None
    ) -> list[Measure]:
        """The figures of a task's rows. reference: rows of the cache that the others are compared with."""


TASKS: dict[str, Task] = {
    "qa": qa,
    "pairs": pairs,
    "code": code,
    "gsm8k": gsm8k,
    "wikitext": wikitext,
    "needle": needle,
}


def parse_tasks(names: str) -> tuple[str, ...]:
    """Names separated by commas, in the order of TASKS; ValueError for others."""
    given = [name.strip() for name in names.split(",") if name.strip()]
    if not given or set(given) - set(TASKS):
        raise ValueError(refusal("--tasks", names, f"{', '.join(TASKS)}, separated by commas", "name some"))
    return tuple(task for task in TASKS if task in given)
