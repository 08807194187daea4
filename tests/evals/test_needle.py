"""Documents with needles: lengths, depths, the same every time, and what counts as found."""

import pytest

from vllm_lexico.evals.settings import NeedleSettings
from vllm_lexico.evals.tasks.needle import ANSWER_TOKENS, Builder, hide, is_found, measures
from vllm_lexico.train.texts import read_documents


@pytest.fixture
def texts(data):
    return read_documents(data / "train_textbooks.jsonl.xz")


@pytest.fixture
def builder(texts, word_tokenizer):
    return lambda tokenizer=None, **settings: Builder(texts, tokenizer or word_tokenizer(), NeedleSettings(**settings))


@pytest.mark.parametrize("kind", ["single", "multi"])
@pytest.mark.parametrize("length", [300, 1000])
def test_a_document_has_its_length_and_its_needles(builder, kind, length):
    build = builder(keys=2)
    read = build.frame.tokenizer.read
    document = build.document(length, kind, 1)
    assert len(document.questions) == (1 if kind == "single" else 2)
    longest = max(len(question.prompt) for question in document.questions)
    assert len(document.prompt) + longest + ANSWER_TOKENS == length
    text = read(document.prompt)
    assert text.startswith("USER Read the text below")
    for question in document.questions:
        assert f'the password of " {question.key} " is " {question.value} "' in text
        asked = read(question.prompt)
        assert f'password of " {question.key} "' in asked and asked.endswith("ASSISTANT")
        assert question.value not in asked
    at = [question.depth for question in document.questions]
    assert at == pytest.approx([0.3] if kind == "single" else [0.25, 0.75], abs=0.1)


def test_documents_are_the_same_every_time_and_not_the_same_each(builder):
    one, again = (builder().document(500, "single", 3) for _ in range(2))
    assert one == again
    others = [builder().document(500, "single", 4), builder(seed=1).document(500, "single", 3)]
    assert all(one.questions[0].value != other.questions[0].value for other in others)


def test_a_model_without_chat_template_is_asked_in_words_and_gets_its_first_token(builder, word_tokenizer):
    build = builder(word_tokenizer(template=False, bos=True))
    read = build.frame.tokenizer.read
    document = build.document(400, "single", 0)
    assert read(document.prompt).startswith("<s> Read the text")
    assert read(document.questions[0].prompt).endswith("Answer : The password is")


def test_too_short_a_document_is_refused(builder):
    with pytest.raises(ValueError, match="has no room for 3 needles"):
        builder(keys=3).document(100, "multi", 0)


def test_hide_takes_the_nearest_boundary():
    paragraphs = [[1] * 10, [2] * 10, [3] * 20]
    ids, addresses = hide(paragraphs, [[7], [8, 8], [9]], [0.0, 0.4, 1.0])
    assert ids == [7] + [1] * 10 + [2] * 10 + [8, 8] + [3] * 20 + [9]
    assert addresses == [0, 21, 43]


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
