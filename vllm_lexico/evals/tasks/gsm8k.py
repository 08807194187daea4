"""GSM8K by lm-evaluation-harness: its task, its prompts and its scoring, on the engine at hand and local files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_lexico.evals.fields import Count, Fields, Flag
from vllm_lexico.evals.measure import Measure
from vllm_lexico.evals.settings import EvalSettings
from vllm_lexico.evals.tasks.windows import read_rows, texts_of

if TYPE_CHECKING:
    from vllm_lexico.evals.engine import Engine

DATA_FILES: tuple[str, ...] = ("gsm8k_test.jsonl.xz", "gsm8k_train.jsonl.xz")
NEEDS_HARNESS = True
LEAVES_SIZES_OUT = False
LONGEST_TOKENS = 4096  # five worked problems, the question and an answer of 256 tokens, with much room
TASK = "gsm8k"
SCORES = {"strict": "strict-match", "flexible": "flexible-extract"}  # ours: the harness's filter


class Row(Fields):
    """The fields of a prediction that `measures` reads. tokens: ids of the answer's tokens."""

    id: Count
    strict: Flag
    flexible: Flag
    tokens: list[Count]


ROWS = list[Row]


def needed_tokens(settings: EvalSettings) -> int:
    """Tokens of the longest sequence that the task will make."""
    return LONGEST_TOKENS


def read_problems(path: Path) -> list[dict[str, str]]:
    """Rows of question and answer; ValueError where the file is not there or is something else."""
    names = ("question", "answer")
    return read_rows(path, lambda row: dict(zip(names, texts_of(row, *names), strict=True)))


def task_config(folder: Path, shots: int) -> dict[str, Any]:
    """The harness's own task, but for where its data comes from: the files in `folder` instead of a download."""
    import datasets
    import yaml

    config = yaml.safe_load((resources.files("lm_eval") / "tasks" / TASK / f"{TASK}.yaml").read_text())
    splits = {split: read_problems(folder / f"{TASK}_{split}.jsonl.xz") for split in ("test", "train")}

    def load(**_ignored: Any) -> dict[str, Any]:
        return {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}

    del config["dataset_path"], config["dataset_name"]
    return config | {"custom_dataset": load, "num_fewshot": shots}


def run(engine: Engine, settings: EvalSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one problem each with the answer, its tokens and both scores, and what the sequences held."""
    from lm_eval import evaluator
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.tasks import TaskManager

    config = task_config(Path(settings.data), settings.gsm8k.shots)
    tasks = TaskManager(include_defaults=False).load([config])
    tasks["tasks"][TASK].set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # as the harness's own command does
    limit = settings.gsm8k.limit
    total = len(read_problems(Path(settings.data) / DATA_FILES[0]))
    engine.expect(total if limit is None else min(limit, total))
    results = evaluator.evaluate(engine.harness.lm, tasks, limit=limit, bootstrap_iters=0, log_samples=True)
    assert results is not None
    samples, lm = results["samples"][TASK], engine.harness.lm
    prompts = {sample["doc_id"]: sample["arguments"][0][0] for sample in samples}
    tokens = {problem: lm.tok_encode(prompt) for problem, prompt in prompts.items()}
    if cut := sum(tuple(prompt) not in engine.harness.answers for prompt in tokens.values()):
        engine.note(f"{cut} of {len(tokens)} prompts lost their first tokens, so that an answer fits --max-model-len")
    rows = prediction_rows(samples, tokens, engine.harness.answers)
    return rows, {"all": engine.meter.take()}


def answer_to(prompt: Sequence[int], answers: Mapping[Any, list[int]]) -> list[int]:
    """The answer to a prompt, of which the harness asks no more than its end where it and an answer are too long."""
    asked = (tuple(prompt[first:]) for first in range(len(prompt)))
    return answers[next(end for end in asked if end in answers)]


def prediction_rows(
    samples: Sequence[Mapping[str, Any]], prompts: Mapping[Any, Sequence[int]], answers: Mapping[Any, list[int]]
) -> list[dict]:
    """One row per problem out of the harness's samples, which come once per way of scoring.

    Args:
        samples: of the harness.
        prompts: token ids, by `doc_id`.
        answers: token ids, by those of what was asked.
    """
    ours = {harness: name for name, harness in SCORES.items()}
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        if sample["doc_id"] not in rows:
            rows[sample["doc_id"]] = {
                "id": sample["doc_id"],
                "question": sample["doc"]["question"],
                "target": sample["target"].split("####")[-1].strip(),
                "prompt_hash": sample["prompt_hash"],
                "answer": sample["resps"][0][0],
                "tokens": answer_to(prompts[sample["doc_id"]], answers),
            }
        name = ours[sample["filter"]]
        rows[sample["doc_id"]] |= {name: int(sample["exact_match"]), f"{name}_match": sample["filtered_resps"][0]}
    return [rows[index] for index in sorted(rows)]


def agreed_tokens(tokens: Sequence[int], reference: Sequence[int]) -> int:
    """Tokens of two answers until they part; all of the shorter where they never do."""
    pairs = zip(tokens, reference, strict=False)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(tokens), len(reference)))


def measures(rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None = None) -> list[Measure]:
    """Share of problems solved, strictly and flexibly matched, and agreement with the reference's answers.

    Agreement: tokens until an answer leaves the reference's, and the share of the reference's tokens that this is.

    Args:
        rows: see `Row`.
        reference: rows of the cache that this one is compared with; None gives no agreement.
    """
    found = [
        Measure(name, "share", {row["id"]: row[score] for row in rows})
        for name, score in (("gsm8k", "strict"), ("gsm8k_flexible", "flexible"))
    ]
    if reference is not None:
        other = {row["id"]: row["tokens"] for row in reference}
        agreed = {r["id"]: agreed_tokens(r["tokens"], other[r["id"]]) for r in rows if r["id"] in other}
        shares = {sample: count / max(len(other[sample]), 1) for sample, count in agreed.items()}
        if agreed:
            found += [Measure("agreement", "mean", shares), Measure("agreement_tokens", "mean", agreed)]
    return found
