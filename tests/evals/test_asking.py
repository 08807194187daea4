"""Texts that are computed before their questions: batches, what is asked of the engine, and sizes that do not fit."""

from types import SimpleNamespace

import pytest

from vllm_lexico.evals.held import Held
from vllm_lexico.evals.tasks.asking import Document, Frame, Question, ask, batches, row_of, shares, that_fit


def documents(*sizes, question=2):
    return [Document([1] * size, [Question([2] * question, {"id": str(i)})]) for i, size in enumerate(sizes)]


class FakeEngine:
    """Remembers what it was asked. Its pool holds 300 tokens, so that a third of it is 100."""

    def __init__(self, max_model_len=100):
        self.max_model_len, self.calls, self.notes, self.ended = max_model_len, [], [], []
        self.meter = SimpleNamespace(take=self.take)
        self.note = self.notes.append

    def capacity_tokens(self):
        return 300

    def take(self):
        ended, self.ended = self.ended, []
        return ended

    def generate(self, prompts, **params):
        self.calls.append((prompts, params))
        self.ended += [Held(len(prompt), 8 * len(prompt)) for prompt in prompts]
        return [SimpleNamespace(prompt_token_ids=prompt) for prompt in prompts]

    def forget(self):
        self.calls.append("forget")


def test_batches_hold_no_more_than_fits_but_one():
    three = documents(40, 40, 40)
    assert [len(batch) for batch in batches(three, 100, 5)] == [2, 1]
    assert [len(batch) for batch in batches(three, 93, 5)] == [1, 1, 1]  # 94 with questions and answers
    assert [len(batch) for batch in batches(three, 10, 5)] == [1, 1, 1]
    assert list(batches([], 10, 5)) == []


def test_a_text_is_computed_before_its_question_comes_after_it():
    engine = FakeEngine()
    answered, held = ask(engine, documents(40, 41, 42), 5, ["stop"])
    text, asked, gone = [1] * 40, [1] * 40 + [2, 2], "forget"
    (texts, first), (questions, second), after, *rest = engine.calls
    assert texts[0] == text and questions[0] == asked and after == gone
    assert [len(prompt) for prompt in texts] == [40, 41] and [len(prompt) for prompt in questions] == [42, 43]
    assert first["max_tokens"] == 1 and second == {"max_tokens": 5, "stop": ["stop"]}
    assert [len(prompt) for call in rest[:2] for prompt in call[0]] == [42, 44] and rest[2] == gone
    assert [len(output.prompt_token_ids) for _, _, output in answered] == [42, 43, 44]
    assert [question.about["id"] for _, question, _ in answered] == ["0", "1", "2"]
    assert [one.tokens for one in held] == [42, 43, 44]  # questions alone


def test_sizes_that_the_engine_cannot_read_are_left_out_with_a_line():
    engine = FakeEngine(50)
    by_size = {20: documents(40, 43), 60: documents(40, 44), 100: documents(90)}
    assert list(that_fit(engine, "qa", by_size, 5)) == [20]  # 43 and 2 and 5 are 50
    assert engine.notes == [
        "qa of 60 was left out: it takes 51 tokens, the engine reads 50",
        "qa of 100 was left out: it takes 97 tokens, the engine reads 50",
    ]
    with pytest.raises(ValueError, match="qa of 60 takes 51 tokens; allowed: what the engine reads, 50; ask for"):
        that_fit(engine, "qa", {100: by_size[100], 60: by_size[60]}, 5)


def test_a_frame_is_the_template_s_or_plain_words(word_tokenizer):
    chat, plain = word_tokenizer(), word_tokenizer(template=False, bos=True)
    frame = Frame(chat, "Read:", "Answer:")
    assert frame.is_chat and chat.read(frame.opening() + frame.question("Who?")) == "USER Read : Who ? ASSISTANT"
    frame = Frame(plain, "Read:", "\nAnswer:")
    assert not frame.is_chat
    assert plain.read(frame.opening() + frame.question("Who?")) == "<s> Read : Who ? \n Answer :"


def test_a_template_that_changes_the_message_is_refused(word_tokenizer):
    tokenizer = word_tokenizer()
    tokenizer.apply_chat_template = lambda *_, **__: "no message"
    with pytest.raises(ValueError, match="does not show the user's message as it is"):
        Frame(tokenizer, "", "")


def test_rows_and_shares():
    output = SimpleNamespace(outputs=[SimpleNamespace(text="yes")], prompt_token_ids=[1, 2, 3], num_cached_tokens=2)
    row = row_of(Question([], {"id": "a", "size": 8}), output)
    assert row == {"id": "a", "size": 8, "answer": "yes", "prompt_tokens": 3, "cached_tokens": 2}
    rows = [{"id": f"{size}/{i}", "size": size, "of": i, "found": i} for size in (8, 16) for i in range(2)]
    found = {measure.name: measure for measure in shares("task", rows, "found", "size", "of")}
    assert set(found) == {"task", "task_8", "task_16"} and found["task_8"].values == {"8/0": 0, "8/1": 1}
    assert found["task"].clusters == {"8/0": 0, "8/1": 1, "16/0": 0, "16/1": 1} and found["task_16"].case == {
        "size": 16
    }
    assert not shares("task", rows, "found", "size")[0].clusters
