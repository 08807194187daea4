"""GSM8K through the harness with local files: its prompts, both ways of scoring, and agreement of answers."""

from types import SimpleNamespace

import pytest

from vllm_lexico.evals.settings import EvalSettings, Gsm8kSettings
from vllm_lexico.evals.tasks import gsm8k
from vllm_lexico.evals.tasks.wikitext import token_losses
from vllm_lexico.evals.tasks.windows import jsonl_windows


def test_agreed_tokens():
    assert gsm8k.agreed_tokens([1, 2, 3], [1, 2, 4, 5]) == 2
    assert gsm8k.agreed_tokens([1, 2], [1, 2, 4]) == 2 and gsm8k.agreed_tokens([], [1]) == 0


def test_agreement_is_a_share_of_the_reference_s_answer():
    rows = [{"id": i, "strict": 1, "flexible": 1, "tokens": tokens} for i, tokens in enumerate([[1, 2, 9], [5]])]
    base = [{"id": i, "strict": 1, "flexible": 1, "tokens": tokens} for i, tokens in enumerate([[1, 2, 3, 4], [5]])]
    found = {measure.name: measure.values for measure in gsm8k.measures(rows, base)}
    assert found["agreement"] == {0: 0.5, 1: 1.0} and found["agreement_tokens"] == {0: 2, 1: 1}
    assert [measure.name for measure in gsm8k.measures(rows)] == ["gsm8k", "gsm8k_flexible"]


def test_an_answer_is_found_by_what_was_left_of_its_prompt():
    answers = {(3, 4, 5): [1], (9, 3, 4, 5): [2], (5,): [3]}
    assert gsm8k.answer_to([3, 4, 5], answers) == [1] and gsm8k.answer_to([7, 7, 3, 4, 5], answers) == [1]
    assert gsm8k.answer_to([9, 3, 4, 5], answers) == [2]
    with pytest.raises(StopIteration):
        gsm8k.answer_to([1, 2], answers)


def test_losses_are_those_of_the_tokens_that_came():
    step = [None, {7: SimpleNamespace(logprob=-0.5)}, {8: SimpleNamespace(logprob=-2.0), 9: SimpleNamespace(logprob=0)}]
    assert token_losses([3, 7, 8], step) == [0.5, 2.0]


def test_a_file_that_is_something_else_is_refused(tmp_path):
    (tmp_path / "gsm8k_test.jsonl.xz").write_bytes(b"no xz")
    with pytest.raises(ValueError, match="cannot be read"):
        gsm8k.read_problems(tmp_path / "gsm8k_test.jsonl.xz")


ODD_LINES = [
    "null",
    "3",
    "[]",
    '"question answer"',
    '{"question": 1, "answer": "2"}',
    '{"question": "1"}',
    '{"question": "\\ud800", "answer": "2"}',
    "[" * 100_000,
    "9" * 5000,
]


@pytest.mark.parametrize("line", ODD_LINES, ids=range(len(ODD_LINES)))
@pytest.mark.parametrize("read", [gsm8k.read_problems, lambda path: jsonl_windows(path, None)])
def test_lines_of_other_types_are_refused_in_one_sentence(tmp_path, line, read):
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "1", "answer": "2"}\n' + line)
    with pytest.raises(ValueError, match=r"test.jsonl cannot be read .*allowed: one JSON object per line") as error:
        read(path)
    assert len(str(error.value)) < 600 and "\n" not in str(error.value)


def test_lines_end_at_line_breaks_alone(tmp_path):
    """Some characters inside of a text are line breaks to Python, and not to JSON."""
    (tmp_path / "rows.jsonl").write_text('{"question": "a\u2028b\x85c", "answer": "d"}\n', encoding="utf-8")
    assert gsm8k.read_problems(tmp_path / "rows.jsonl") == [{"question": "a\u2028b\x85c", "answer": "d"}]


def test_the_harness_asks_and_scores(data):
    model = pytest.importorskip("lm_eval.api.model")
    answers = iter([" It is 1.\n#### 1", " I think that it is 2", " no idea", " #### 4"])

    class Canned(model.LM):
        """Answers in order and keeps what it was asked."""

        asked: list[str] = []  # noqa: RUF012

        def generate_until(self, requests, disable_tqdm=False):
            self.asked += [request.args[0] for request in requests]
            return [next(answers) for _ in requests]

        def tok_encode(self, text):
            return [len(text)]

        loglikelihood = loglikelihood_rolling = None

    lm = Canned()
    totals = []
    engine = SimpleNamespace(expect=totals.append, meter=SimpleNamespace(take=list))
    engine.harness = SimpleNamespace(lm=lm, answers=_Any([11, 12]))
    rows, held = gsm8k.run(engine, EvalSettings("m", str(data), gsm8k=Gsm8kSettings(shots=2, limit=4)))
    assert [(row["strict"], row["flexible"]) for row in rows] == [(1, 1), (0, 1), (0, 0), (1, 1)]
    assert [row["target"] for row in rows] == ["1", "2", "3", "4"] and rows[1]["flexible_match"] == "2"
    assert all(asked.count("Question: ") == 3 and asked.endswith("Answer:") for asked in lm.asked)
    assert totals == [4] and held == {"all": []} and rows[0]["tokens"] == [11, 12]


class _Any(dict):
    """Any prompt's answer."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens = tokens

    def __contains__(self, prompt):
        return True

    def __missing__(self, prompt):
        return self.tokens
