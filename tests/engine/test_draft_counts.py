"""What `drafts.py` counts where answers are known: loops that were planted, and drafts that must be right.

Greedy answers alone: with drafts vLLM 0.32's CPU build samples tokens that have no probability, with any backend.
"""

import pytest

pytest.importorskip("vllm")
from draft_counting import HIDDEN, LAST_LETTERS, VOCABULARY, count_drafts, plant_answers
from engines import TEXT_CHARACTERS
from processes import in_a_process

ANSWER, COUNT = 64, 12
SETTINGS = {"enforce_eager": True, "dtype": "float32", "seed": 0, "block_size": 64, "characters": TEXT_CHARACTERS}


@pytest.fixture(scope="module")
def said(root, write_letters_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    shape = {"head_dim": 64, "hidden_size": HIDDEN, "intermediate_size": 64, "vocab_size": VOCABULARY}
    model = write_letters_model(folder / "model", 1, 2, **shape)
    plant_answers(model)
    asked = {"requests": COUNT, "answer": ANSWER, "brief": COUNT, "sampled": 0, "sampled_tokens": 0}
    given = str(root / "benchmarks"), str(model), {"codec": "exact", "window": 0}, SETTINGS, folder / "out.json"
    return in_a_process(count_drafts, *given, asked | {"longest": 300})


@pytest.mark.parametrize("how", ["greedy", "brief"])
def test_planted_loops_are_counted_and_nothing_else(said, how):
    """The other answers run along a circle that is longer than they are, and brief ones end before they repeat much."""
    loops = [loops for _, _, loops in said["found"][how]["answers"]]
    planted = [token in LAST_LETTERS for token in said["last"]]
    assert loops == ([False] * COUNT if how == "brief" else planted) and 0 < sum(planted) < COUNT


def test_drafts_are_right_where_an_answer_repeats_itself(said):
    for accepted, drafted, loops in said["found"]["greedy"]["answers"]:
        if loops:  # after two rounds at the latest three of four tokens are drafts, and the rest is one of each step's
            assert 0.9 * drafted < accepted <= drafted and accepted >= 0.7 * (ANSWER - 2 * 7)
        else:  # its tokens were never seen before
            assert accepted == 0


def test_counts_of_answers_are_vllms_in_all(said):
    """But for the prompt by which kernels are compiled; it is the first greedy one again."""
    answers = [answer for one in said["found"].values() for answer in one["answers"]]
    first = said["found"]["greedy"]["answers"][0]
    assert said["counted"] == [sum(one[at] for one in [*answers, first]) for at in (0, 1)]
