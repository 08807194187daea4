"""Which sparsity loses less than a limit on which task, and whether the samples can tell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from vllm_lexico.evals.caches import LEXICO
from vllm_lexico.evals.fields import Count, Fields, Positive, Printable
from vllm_lexico.evals.results.statistics import Z95

LIMITS = (1, 3, 10)  # per cent
# What a task's main figure, which has the task's name, stands for.
KINDS = {
    "qa": "questions about long documents",
    "pairs": "exact strings from long texts",
    "code": "programs after long code",
    "gsm8k": "reasoning after short texts",
    "wikitext": "perplexity",
    "needle": "passwords in long texts",
}
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Loss(Fields):
    """What a cache loses of the reference's figure, in per cent; negative where it gains. least, most: of 95 %."""

    cache: Printable
    bytes_percent: Positive
    loss: Finite
    most: Finite | None
    least: Finite | None


class Answer(Fields):
    """What is known for a limit.

    state: "shown" that `cache`, the smallest so far, loses less; "not shown", as the samples cannot tell; "more" where
        every cache is shown to lose at least that.
    cache: the one that is shown, or the one that comes nearest.
    """

    state: Literal["shown", "not shown", "more"]
    cache: Printable


class TaskLosses(Fields):
    """The losses at a task, caches from fewest to most bytes, and the answers by limit. few: samples, where too few."""

    few: Count | None
    caches: list[Loss]
    answers: dict[Printable, Answer]


def losses(caches: Mapping[str, Mapping[str, Any]], few_samples: Mapping[str, int]) -> dict[str, Any]:
    """Of each task that has a reference's figure, what LEXICO's caches lose; see `TaskLosses`.

    Args:
        caches: figures by the cache's name, as `collect` has them.
        few_samples: of tasks that have too few to show anything.
    """
    found = {}
    for task in KINDS:
        of_task = [
            loss_of(name, cache["bytes_percent"], measure)
            for name, cache in caches.items()
            if cache["family"] == LEXICO and task in cache["tasks"]
            for measure in cache["tasks"][task]["measures"]
            if measure["metric"] == task and measure["ratio"] is not None and measure["peer_value"]
        ]
        if of_task:
            of_task.sort(key=lambda loss: (loss["bytes_percent"], loss["cache"]))
            few = few_samples.get(task)
            answers = {str(limit): _answer(of_task, limit, few is not None) for limit in LIMITS}
            found[task] = {"few": few, "caches": of_task, "answers": answers}
    return found


def loss_of(name: str, bytes_percent: float, measure: Mapping[str, Any]) -> dict[str, Any]:
    """What a cache loses by one figure, see `Loss`.

    The interval is the one that resampling gives the ratio, and for shares no narrower than Bonett and Price's of a
    difference of paired shares (2012), which does not shrink to a point where no sample is lost or won.
    """
    sign = -1 if measure["kind"] == "perplexity" else 1
    loss = 100 * sign * (1 - measure["ratio"])
    ends = [100 * sign * (1 - measure[end]) for end in ("ratio_low", "ratio_high") if measure[end] is not None]
    lost, won = measure.get("lost"), measure.get("won")  # absent in files of earlier versions
    if lost is not None and won is not None and ends:
        low, high = paired_difference(lost, won, measure["count"])
        ends += [100 * low / measure["peer_value"], 100 * high / measure["peer_value"]]
    most, least = (max(ends), min(ends)) if ends else (None, None)
    return {"cache": name, "bytes_percent": bytes_percent, "loss": loss, "most": most, "least": least}


def paired_difference(lost: int, won: int, count: int) -> tuple[float, float]:
    """The 95 % interval of the share lost less the share won: Wald's, with one sample more of each kind."""
    of_lost, of_won = (lost + 1) / (count + 2), (won + 1) / (count + 2)
    middle = of_lost - of_won
    half = Z95 * math.sqrt(max(of_lost + of_won - middle**2, 0) / (count + 2))
    return middle - half, middle + half


def _answer(of_task: list[dict[str, Any]], limit: int, few: bool) -> dict[str, str]:
    """See `Answer`. of_task: from fewest to most bytes."""
    shown = [] if few else [each for each in of_task if each["most"] is not None and each["most"] < limit]
    if shown:
        return {"state": "shown", "cache": shown[0]["cache"]}
    nearest = min(of_task, key=lambda each: each["loss"])
    more = not few and all(each["least"] is not None and each["least"] >= limit for each in of_task)
    return {"state": "more" if more else "not shown", "cache": nearest["cache"]}


def loss_lines(metrics: Mapping[str, Any]) -> list[str]:
    """A line per task, after one that says what they are; nothing where no task has a reference."""
    found = losses(metrics["caches"], metrics.get("few_samples", {}))  # also of files that do not have them yet
    lines = [_line(task, of_task) for task, of_task in found.items()]
    if not lines:
        return []
    head = f"The sparsity that loses less than so much of {metrics['reference']}'s, smallest first, where it is shown "
    return [f"{head}(97.5 % sure):", *lines]


def _line(task: str, of_task: Mapping[str, Any]) -> str:
    by_name = {loss["cache"]: loss for loss in of_task["caches"]}
    said = []
    for limit, answer in of_task["answers"].items():
        about = _about(by_name[answer["cache"]])
        if answer["state"] == "shown":
            said.append(f"{limit} %: {answer['cache']} ({about})")
        elif answer["state"] == "more":
            said.append(f"{limit} %: none of these (best {answer['cache']}: {about})")
        else:
            said.append(f"{limit} %: not shown (best {answer['cache']}: {about})")
    few = f"; {of_task['few']} samples are too few to show it" if of_task["few"] is not None else ""
    return f"- {task} ({KINDS[task]}): {'; '.join(_merged(said))}{few}"


def _about(loss: Mapping[str, Any]) -> str:
    most = "" if loss["most"] is None else f", at most {loss['most']:.1f} %"
    return f"{loss['loss']:.1f} %{most}"


def _merged(said: Iterable[str]) -> list[str]:
    """Limits with one answer said together: "1 % and 3 %: not shown"."""
    merged: dict[str, list[str]] = {}
    for words in said:
        limit, _, answer = words.partition(": ")
        merged.setdefault(answer, []).append(limit)
    return [f"{' and '.join(limits)}: {answer}" for answer, limits in merged.items()]
