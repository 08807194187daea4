"""The same request cold and from the prefix cache: answers differ, but for the setting "same"."""

import pytest

pytest.importorskip("vllm")
from engines import answer_again
from processes import in_a_process

SMALL_CHUNKS = {"max_num_batched_tokens": 96, "max_num_seqs": 4}
CASES = {"codes": ("codes", {}), "same": ("same", {}), "same, chunks": ("same", SMALL_CHUNKS)}


@pytest.fixture(scope="module")
def answers(strong_llama, strong_dictionary):
    lexico = {"dictionary": str(strong_dictionary), "sparsity": 3}
    return {
        name: in_a_process(answer_again, str(strong_llama), lexico | {"prefix_hits": hits}, settings)
        for name, (hits, settings) in CASES.items()
    }


def test_answers_differ_after_hits_that_read_codes(answers):
    assert answers["codes"]["cold"] != answers["codes"]["again"] and min(answers["codes"]["hits"]) >= 256


@pytest.mark.parametrize("case", ["same", "same, chunks"])
def test_answers_are_the_same_cold_and_from_the_cache(answers, case):
    assert answers[case]["cold"] == answers[case]["again"]
    assert answers[case]["hits"] == [256, 384, 512]  # a prompt's last block is never taken whole


def test_answers_do_not_depend_on_chunks(answers):
    """But for rounding, which may now and then choose another atom."""
    pairs = zip(answers["same"]["cold"], answers["same, chunks"]["cold"], strict=True)
    assert sum(whole == chunked for whole, chunked in pairs) >= 2


@pytest.mark.parametrize("case", ["same", "same, chunks"])
def test_planted_faults_are_seen(answers, case):
    assert [fault for fault, said in answers[case]["faults"].items() if said == answers[case]["cold"]] == []
