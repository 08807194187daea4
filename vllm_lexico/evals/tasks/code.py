"""Programs for problems of MBPP (Austin et al., 2021), written after many solved ones and run against their tests.

The solved problems are computed first and the new one comes after them (`asking`). Problems are of MBPP's test split,
those before them of its other splits. Programs run in a sandbox (`sandbox`).
"""

from __future__ import annotations

import ast
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm_lexico.errors import is_whole_number, refusal
from vllm_lexico.evals.fields import Count, Fields, Flag
from vllm_lexico.evals.measure import Measure
from vllm_lexico.evals.sandbox.run import find_layers, run_program
from vllm_lexico.evals.settings import CodeSettings, EvalSettings
from vllm_lexico.evals.tasks.asking import Document, Frame, Question, ask, row_of, that_fit
from vllm_lexico.evals.tasks.windows import list_of_texts, read_rows, texts_of

if TYPE_CHECKING:
    from vllm_lexico.evals.engine import Engine

DATA_FILES: tuple[str, ...] = ("mbpp.jsonl.xz",)
NEEDS_HARNESS = False
LEAVES_SIZES_OUT = True
TEST_SPLIT = range(11, 511)  # of task_id, as the dataset's authors split it
ANSWER_TOKENS = 384
SOLVED_TOKENS = 260  # more than a solved problem has on average: 170 to 200, by the tokenizer
MARGIN_TOKENS = 1500

OPENING = "Below are problems, each with a Python program that solves it. A new problem follows at their end.\n\n"
PROBLEM = "Problem: {text}\nThe program should pass these tests:\n{tests}\n"
SOLVED = PROBLEM + "[BEGIN]\n{program}\n[DONE]\n\n"
QUESTION = PROBLEM + "Write the Python program for this problem alone, between [BEGIN] and [DONE] like those above."
BASE_QUESTION, ENDING = PROBLEM, "[BEGIN]\n"


class Row(Fields):
    """The fields of a prediction that `measures` reads. id: the problem's in MBPP."""

    id: Count
    solved: Flag


ROWS = list[Row]


class Problem(NamedTuple):
    """A problem of MBPP. setup: a program that runs before its tests."""

    number: int
    text: str
    program: str
    tests: tuple[str, ...]
    setup: str


def read_problems(path: Path) -> list[Problem]:
    """Rows of MBPP as its authors publish them; ValueError where the file is something else."""

    def problem(row: Any) -> Problem:
        number, (text, program) = row["task_id"], texts_of(row, "text", "code")
        tests = list_of_texts(row["test_list"])
        if not is_whole_number(number, 0, 10**9) or not tests:
            raise ValueError("a problem has no number or no test")
        (setup,) = texts_of({"test_setup_code": ""} | row, "test_setup_code")
        program = program.replace("\r\n", "\n").strip()
        return Problem(number, text.strip(), program, tuple(tests), setup)

    return read_rows(path, problem)


def needed_tokens(settings: EvalSettings) -> int:
    """Tokens that the longest sequence hardly exceeds; longer ones are refused by their tokens (`that_fit`)."""
    return settings.code.solved * SOLVED_TOKENS + MARGIN_TOKENS


class Builder:
    """Builds contexts for one tokenizer; the same every time for the same settings.

    Raises:
        ValueError: there are fewer problems than the settings ask for.
    """

    def __init__(self, problems: Sequence[Problem], tokenizer: Any, settings: CodeSettings) -> None:
        self.settings = settings
        self.frame = Frame(tokenizer, OPENING, ENDING)
        tests = [problem for problem in problems if problem.number in TEST_SPLIT]
        self.others = [problem for problem in problems if problem.number not in TEST_SPLIT]
        for flag, wanted, there in (
            ("--code-samples", settings.samples, len(tests)),
            ("--code-solved", settings.solved, len(self.others)),
        ):
            if wanted > there:
                raise ValueError(refusal(flag, wanted, f"1 to {there}, as many as the data has", "lower it"))
        self.problems = random.Random(f"{settings.seed} problems").sample(tests, settings.samples)
        self._ids = {problem.number: self.frame.encode(_shown(SOLVED, problem)) for problem in self.others}

    def document(self, index: int) -> Document:
        """Solved problems, and a new one after them. index: of the new one."""
        problem = self.problems[index]
        generator = random.Random(f"{self.settings.seed} {index}")
        prompt = self.frame.opening()
        for other in generator.sample(self.others, self.settings.solved):
            prompt += self._ids[other.number]
        question = self.frame.question(_shown(QUESTION if self.frame.is_chat else BASE_QUESTION, problem))
        return Document(prompt, [Question(question, {"id": problem.number})])


def _shown(words: str, problem: Problem) -> str:
    return words.format(text=problem.text, tests="\n".join(problem.tests), program=problem.program)


def program_of(answer: str, *, was_cut: bool = False) -> str:
    """The program in an answer: what stands between [BEGIN] and [DONE], and in a fence where there is one.

    Args:
        answer: of a model.
        was_cut: the answer was as long as answers may be; lines at its end that are no Python are then left out.
    """
    inside = answer.partition("[DONE]")[0].rpartition("[BEGIN]")[2]
    fenced = re.search(r"```(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:```|\Z)", inside, re.DOTALL)
    lines = (fenced[1] if fenced else inside).strip("\n").split("\n")
    whole = len(lines)
    while was_cut and whole and not _is_python("\n".join(lines[:whole])):
        whole -= 1
    return "\n".join(lines[:whole])


def _is_python(program: str) -> bool:
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def run(engine: Engine, settings: EvalSettings) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of one problem each, and what the sequences held."""
    task = settings.code
    builder = Builder(read_problems(Path(settings.data) / DATA_FILES[0]), engine.tokenizer, task)
    by_size = {task.solved: [builder.document(i) for i in range(task.samples)]}
    documents = that_fit(engine, "code", by_size, ANSWER_TOKENS)[task.solved]
    layers = find_layers()
    for words in layers.missing():
        engine.note(f"code: {words}")
    engine.expect(2 * len(documents))
    answered, held = ask(engine, documents, ANSWER_TOKENS, ("[DONE]",))
    problems = {problem.number: problem for problem in builder.problems}
    rows = []
    for _, question, output in answered:
        row = row_of(question, output)
        problem = problems[row["id"]]
        program = program_of(row["answer"], was_cut=output.outputs[0].finish_reason == "length")
        outcome = run_program(program, [problem.setup, *problem.tests])
        rows.append(row | {"solved": int(outcome.passed), "why": outcome.reason})
    return rows, {"all": held}


def measures(rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None = None) -> list[Measure]:
    """Share of problems whose program passes its tests."""
    return [Measure("code", "share", {row["id"]: row["solved"] for row in rows})]
