"""Questions about passages, values of keys, programs after programs: contexts, what is asked, and what counts."""

import re
from types import SimpleNamespace

import pytest

from vllm_lexico.evals.settings import CodeSettings, EvalSettings, PairsSettings, QaSettings
from vllm_lexico.evals.tasks import code, pairs, qa


@pytest.fixture
def build_qa(data, word_tokenizer):
    passages = qa.read_passages(data / "xquad_en.jsonl.xz")
    return lambda tokenizer=None, **settings: qa.Builder(
        passages, tokenizer or word_tokenizer(), QaSettings(**settings)
    )


@pytest.fixture
def build_code(data, word_tokenizer):
    problems = code.read_problems(data / "mbpp.jsonl.xz")
    return lambda tokenizer=None, **settings: code.Builder(
        problems, tokenizer or word_tokenizer(), CodeSettings(**settings)
    )


def test_a_question_is_about_one_of_the_passages_before_it(build_qa):
    build = build_qa(passages=(5,), samples=24)
    read = build.frame.tokenizer.read
    places = set()
    for index in range(24):
        document = build.document(5, index)
        text, (question,) = read(document.prompt), document.questions
        towers = re.findall(r"The tower of (town\d+) is", text)
        assert len(set(towers)) == len(towers) == 5 and text.startswith("USER Read the passages")
        asked, value = read(question.prompt), question.about["value"]
        town = re.search(r"town\d+", asked)[0]
        assert town == f"town{question.about['passage']}" and asked.endswith("ASSISTANT") and value not in asked
        assert f"{town} is {value} high" in text or re.search(rf"{town} [^T]* built by {value} \.", text)
        assert question.about["depth"] == pytest.approx(towers.index(town) / 5, abs=0.01)
        places.add(towers.index(town))
    assert len(places) > 2


def test_every_passage_is_asked_about_once_before_any_is_twice(build_qa):
    build = build_qa(passages=(3,), samples=24)
    at = [build.document(3, index).questions[0].about["passage"] for index in range(24)]
    assert sorted(at[:12]) == sorted(at[12:]) == list(range(12)) and at[:12] != list(range(12))
    assert len({build.document(3, index).questions[0].about["id"] for index in range(24)}) == 24


def test_contexts_are_the_same_every_time_and_not_the_same_each(build_qa, word_tokenizer):
    one, again = (build_qa(passages=(5,), samples=9).document(5, 3) for _ in range(2))
    assert one == again != build_qa(passages=(5,), samples=9).document(5, 4)
    assert one != build_qa(passages=(5,), samples=9, seed=1).document(5, 3)
    of_pairs = [pairs.Builder(word_tokenizer(), PairsSettings(seed=seed)).document(4, i) for seed, i in
                ((0, 0), (0, 0), (0, 1), (1, 0))]  # fmt: skip
    values = [document.questions[0].about["value"] for document in of_pairs]
    assert values[0] == values[1] and len(set(values)) == 3


@pytest.mark.parametrize(
    ("value", "answer", "found", "exact"),
    [
        ("308", "308", 1, 1),
        ("308", "The Panthers surrendered 308 points.", 1, 0),
        ("308", "1,308", 0, 0),
        ("the Norman dynasty", "Norman Dynasty.", 1, 1),
        ("Norman dynasty", "dynasty of the Normans", 0, 0),
        ("Kony Ealy", "", 0, 0),
        ("Kony Ealy", "\nKony Ealy\nPassage: and so on", 1, 1),
    ],
)
def test_score_of_an_answer(value, answer, found, exact):
    scored = qa.score(value, answer)
    assert (scored["found"], scored["exact"]) == (found, exact) and exact <= scored["f1"] <= 1


def test_f1_counts_words_that_are_shared():
    assert qa.score("three red ships", "two red ships")["f1"] == pytest.approx(2 / 3)


def test_measures_of_questions_count_a_passage_once():
    rows = [
        {"id": f"{count}/{at}", "passages": count, "passage": at, "found": 1, "exact": 0, "f1": 0.5}
        for count in (20, 60)
        for at in range(2)
    ]
    found = {measure.name: measure for measure in qa.measures(rows)}
    assert set(found) == {"qa", "qa_20", "qa_60", "qa_exact", "qa_f1"}
    assert found["qa"].clusters == found["qa_f1"].clusters == {"20/0": 0, "20/1": 1, "60/0": 0, "60/1": 1}
    assert found["qa_60"].case == {"passages": 60} and found["qa_f1"].kind == "mean"


def test_pairs_are_json_and_one_of_their_keys_is_asked_for(word_tokenizer):
    build = pairs.Builder(word_tokenizer(), PairsSettings())
    read = build.frame.tokenizer.read
    for index in range(8):
        document = build.document(6, index)
        text = re.sub(r"\s", "", read(document.prompt))
        about = document.questions[0].about
        uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
        assert len(re.findall(f'"{uuid}":"{uuid}"', text)) == 6 and text.endswith('"}') and text.count('",') == 5
        assert f'"{about["key"]}":"{about["value"]}"' in text
        asked = re.sub(r"\s", "", read(document.questions[0].prompt))
        assert about["key"] in asked and about["value"] not in asked


def test_a_value_is_found_when_all_its_digits_are_there():
    value = "02d6f843-e3c1-48a9-80bf-d2823791fcce"
    assert pairs.is_found(value, f'"{value}"') and pairs.is_found(value, f"It is {value.upper()}.")
    assert pairs.is_found(value, value.replace("-", " "))
    assert not pairs.is_found(value, value[:-1]) and not pairs.is_found(value, value.replace("e3c1", "e3c2"))


def test_a_new_problem_comes_after_solved_ones_of_other_splits(build_code):
    build = build_code(solved=4, samples=10)
    read = build.frame.tokenizer.read
    numbers = set()
    for index in range(10):
        document = build.document(index)
        text, (question,) = read(document.prompt), document.questions
        solved = [int(number) for number in re.findall(r"BEGIN \] \n def add(\d+) ", text)]
        assert len(set(solved)) == 4 == text.count("[ DONE ]") and max(solved) <= 10
        number = question.about["id"]
        asked = read(question.prompt)
        assert 11 <= number <= 20 and f"assert add{number} ( 1 )" in asked and f"x + {number}" not in asked
        numbers.add(number)
    assert len(numbers) == 10


def test_a_model_without_chat_template_goes_on_where_its_program_begins(build_code, word_tokenizer):
    build = build_code(word_tokenizer(template=False), solved=2, samples=1)
    asked = build.frame.tokenizer.read(build.document(0).questions[0].prompt)
    assert asked.endswith("\n [ BEGIN ] \n") and "alone" not in asked


@pytest.mark.parametrize(
    "answer",
    [
        "x = 1\n[DONE]\nProblem: more",
        "Sure:\n[BEGIN]\nx = 1\n[DONE]",
        "Here it is.\n```python\nx = 1\n```\nIt sets x.",
        "[BEGIN]\n```\nx = 1\n```\n[DONE]",
        "```py\nx = 1",
    ],
)
def test_program_of_an_answer(answer):
    assert code.program_of(answer) == "x = 1"


def test_what_an_answer_that_was_cut_ends_with_is_left_out():
    answer = "```python\ndef f(x):\n    return x\n\ndef f(x):\n    return x[0"
    assert code.program_of(answer, was_cut=True) == "def f(x):\n    return x\n"
    assert code.program_of(answer).endswith("return x[0")
    assert code.program_of("def f(:", was_cut=True) == ""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda build_qa, _: build_qa(passages=(3,), samples=25), "--qa-samples was given as 25; allowed: 1 to 24"),
        (lambda build_qa, _: build_qa(passages=(13,), samples=2), "--qa-passages was given as 13; allowed: 1 to 12"),
        (lambda _, build: build(solved=4, samples=11), "--code-samples was given as 11; allowed: 1 to 10"),
        (lambda _, build: build(solved=11, samples=1), "--code-solved was given as 11; allowed: 1 to 10"),
        (lambda *_: QaSettings(passages=()), "--qa-passages was given as ''"),
        (lambda *_: PairsSettings(pairs=(5, 5)), "--pairs was given as '5 5'"),
        (lambda *_: PairsSettings(pairs=(0,)), "--pairs was given as 0"),
    ],
)
def test_more_than_the_data_has_is_refused(build_qa, build_code, make, words):
    with pytest.raises(ValueError, match=words):
        make(build_qa, build_code)


NO_ANSWER = '{"context": "a", "qas": [{"question": "b", "answers": []}]}'


@pytest.mark.parametrize("line", ["null", "[]", '{"context": "a", "qas": []}', NO_ANSWER])
def test_passages_of_other_types_are_refused(tmp_path, line):
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(ValueError, match=r"x\.jsonl cannot be read"):
        qa.read_passages(tmp_path / "x.jsonl")


@pytest.mark.parametrize("changed", ['"task_id": "1"', '"test_list": []', '"test_list": "assert x"', '"code": 1'])
def test_problems_of_other_types_are_refused(tmp_path, changed):
    whole = '"task_id": 1, "text": "a", "code": "x = 1", "test_list": ["assert x"]'
    (tmp_path / "x.jsonl").write_text("{" + whole + "}")
    assert code.read_problems(tmp_path / "x.jsonl") == [(1, "a", "x = 1", ("assert x",), "")]
    (tmp_path / "x.jsonl").write_text("{" + whole + ", " + changed + "}")
    with pytest.raises(ValueError, match=r"x\.jsonl cannot be read"):
        code.read_problems(tmp_path / "x.jsonl")


class AnsweringEngine:
    """Answers what `answer` makes of a prompt in words."""

    def __init__(self, tokenizer, answer):
        self.tokenizer, self.answer, self.max_model_len = tokenizer, answer, 10**6
        self.totals, self.notes, self.asked = [], [], []
        self.meter = SimpleNamespace(take=list)
        self.expect, self.note = self.totals.append, self.notes.append

    def capacity_tokens(self):
        return 10**6

    def forget(self):
        pass

    def generate(self, prompts, **params):
        self.asked += [self.tokenizer.read(prompt) for prompt in prompts]
        texts = [self.answer(self.tokenizer.read(prompt)) for prompt in prompts]
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(text=text, finish_reason="stop")], prompt_token_ids=prompt, num_cached_tokens=1
            )
            for text, prompt in zip(texts, prompts, strict=True)
        ]


def test_right_answers_are_found_and_wrong_ones_are_not(data, word_tokenizer):
    """Each task end to end with an engine that knows half of the answers."""
    settings = EvalSettings(
        "m", str(data), qa=QaSettings((3, 5), 12), pairs=PairsSettings((4,), 6), code=CodeSettings(3, 10)
    )

    def mason(prompt):
        asked = re.search(r"Who built the tower of town(\d+)", prompt)
        return f"It was mason{asked[1]}." if asked else "I do not know."

    engine = AnsweringEngine(word_tokenizer(), mason)
    rows, held = qa.run(engine, settings)
    assert len(rows) == 24 and engine.totals == [48] and set(held) == {"all", "3", "5"}
    assert all(row["found"] == row["value"].startswith("mason") for row in rows)
    assert {row["found"] for row in rows} == {0, 1}

    def first_value(prompt):
        return re.search(r": \" ([0-9a-f -]+) \"", prompt)[1].replace(" ", "")

    rows, _ = pairs.run(AnsweringEngine(word_tokenizer(), first_value), settings)
    assert [row["found"] for row in rows] == [int(row["depth"] == 0) for row in rows] and len(rows) == 6

    def add(prompt):
        number = int(re.findall(r"assert add(\d+)", prompt)[-1])
        return f"[BEGIN]\ndef add{number}(x):\n    return x + {number if number % 2 else 0}\n[DONE]"

    rows, _ = code.run(AnsweringEngine(word_tokenizer(), add), settings)
    assert [row["solved"] for row in rows] == [row["id"] % 2 for row in rows] and len(rows) == 10
    assert {row["why"] for row in rows} == {"", "AssertionError"}
