"""Documents with needles: lengths, depths, the same every time, and what counts as found."""

import re

import pytest

from vllm_lexico.evals.settings import NeedleSettings
from vllm_lexico.evals.tasks.needle import ANSWER_TOKENS, Builder, batches, hide, is_found, measures
from vllm_lexico.train.texts import read_documents


class WordTokenizer:
    """A token for each word or sign; remembers them, so that ids can be read back."""

    bos_token_id = 0

    def __init__(self, template=True, bos=False):
        self.chat_template, self.bos, self.known = template or None, bos, ["<s>"]

    def __call__(self, text, add_special_tokens=True, **_):
        ids = []
        for word in re.findall(r"\w+|\n|[^\w\s]", text):
            if word not in self.known:
                self.known.append(word)
            ids.append(self.known.index(word))
        return {"input_ids": [0, *ids] if self.bos and add_special_tokens else ids}

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return f"USER {messages[0]['content']} ASSISTANT"

    def read(self, ids):
        return " ".join(self.known[i] for i in ids)


@pytest.fixture
def texts(data):
    return read_documents(data / "train_textbooks.jsonl.xz")


def builder(texts, tokenizer=None, **settings):
    return Builder(texts, tokenizer or WordTokenizer(), NeedleSettings(**settings))


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("length", [300, 1000])
def test_a_document_has_its_length_and_its_needles(texts, kind, length):
    build = builder(texts, keys=2)
    document = build.document(length, kind, 1)
    assert len(document.questions) == (1 if kind == "single" else 2)
    longest = max(len(question.prompt) for question in document.questions)
    assert len(document.prompt) + longest + ANSWER_TOKENS == length
    text = build.tokenizer.read(document.prompt)
    assert text.startswith("USER Read the text below")
    for question in document.questions:
        assert f'the password of " {question.key} " is " {question.value} "' in text
        asked = build.tokenizer.read(question.prompt)
        assert f'password of " {question.key} "' in asked and asked.endswith("ASSISTANT")
        assert question.value not in asked
    at = [question.depth for question in document.questions]
    assert at == pytest.approx([0.3] if kind == "single" else [0.25, 0.75], abs=0.1)


def test_documents_are_the_same_every_time_and_not_the_same_each(texts):
    one, again = (builder(texts).document(500, "single", 3) for _ in range(2))
    assert one == again
    others = [builder(texts).document(500, "single", 4), builder(texts, seed=1).document(500, "single", 3)]
    assert all(one.questions[0].value != other.questions[0].value for other in others)


def test_a_model_without_chat_template_is_asked_in_words_and_gets_its_first_token(texts):
    build = builder(texts, WordTokenizer(template=False, bos=True))
    document = build.document(400, "single", 0)
    assert build.tokenizer.read(document.prompt).startswith("<s> Read the text")
    assert build.tokenizer.read(document.questions[0].prompt).endswith("Answer : The password is")


def test_too_short_a_document_is_refused(texts):
    with pytest.raises(ValueError, match="has no room for 3 needles"):
        builder(texts, keys=3).document(100, "multi", 0)


def test_hide_takes_the_nearest_boundary():
    paragraphs = [[1] * 10, [2] * 10, [3] * 20]
    ids, addresses = hide(paragraphs, [[7], [8, 8], [9]], [0.0, 0.4, 1.0])
    assert ids == [7] + [1] * 10 + [2] * 10 + [8, 8] + [3] * 20 + [9]
    assert addresses == [0, 21, 43]


def test_batches_hold_no_more_than_fits_but_one(texts):
    documents = [builder(texts).document(300, "single", i) for i in range(3)]
    size = 300 + len(documents[0].questions[0].prompt) + ANSWER_TOKENS
    assert [len(batch) for batch in batches(documents, 2 * size + 9)] == [2, 1]
    assert [len(batch) for batch in batches(documents, 10)] == [1, 1, 1]


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("quiet marble", True),
        ('The password is "Quiet Marble".', True),
        ("quiet-marble", True),
        ("marble quiet", False),
        ("quiet marbles", False),
        ("", False),
    ],
)
def test_is_found(answer, found):
    assert is_found("quiet marble", answer) is found


def test_measures_by_length_and_kind():
    rows = [
        {"id": "a", "document": "d", "length": 8, "kind": "multi", "found": 1},
        {"id": "b", "document": "d", "length": 8, "kind": "multi", "found": 0},
        {"id": "c", "document": "e", "length": 16, "kind": "single", "found": 1},
    ]
    found = {measure.name: measure for measure in measures(rows)}
    assert set(found) == {"needle", "needle_8", "needle_8_multi", "needle_16", "needle_16_single"}
    assert found["needle_8"].values == {"a": 1, "b": 0} and found["needle_8"].clusters == {"a": "d", "b": "d"}
    assert found["needle_16_single"].clusters == {} and found["needle_16"].case == {"length": 16}
