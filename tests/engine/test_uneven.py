"""KV heads of other sparsities in a whole engine: answers are the oracle's, and alike cold, after hits and preemption.

A tiny model of four KV heads per layer, whose dictionary has heads that are asked much in places that are not side by
side, so that layers put them into another order.
"""

import pytest

pytest.importorskip("vllm")
from oracle import Oracle
from processes import in_a_process
from uneven_answers import OWN_FAULTS, PROMPTS, TOKENS, answer_alike, answer_unevenly

from vllm_lexico.config import LexicoConfig
from vllm_lexico.dictionary.file import load_dictionary

SETTINGS = {"sparsity": 7, "uneven": [3, 11]}
TIE = 1e-3  # nats; float32 leaves near ties


@pytest.fixture(scope="module")
def uneven(write_letters_model, load_benchmark, tmp_path_factory):
    """A model and its dictionary."""
    folder = tmp_path_factory.mktemp("uneven")
    changes = {"head_dim": 64, "hidden_size": 192, "intermediate_size": 256, "vocab_size": 100}
    model = write_letters_model(folder / "model", 3, 4, **changes, initializer_range=0.15, max_position_embeddings=1024)
    written = load_benchmark("bench/shapes").write_random_dictionary(model, atoms=256)
    return model, written.rename(folder / written.name)


@pytest.fixture(scope="module")
def answers(uneven):
    model, dictionary = map(str, uneven)
    return in_a_process(answer_unevenly, model, {"dictionary": dictionary} | SETTINGS)


@pytest.fixture(scope="module")
def worst_regret(uneven):
    model, dictionary = uneven
    settings = LexicoConfig.from_additional_config({"lexico": SETTINGS})
    oracle = Oracle.of(model, dictionary=load_dictionary(dictionary), settings=settings)

    def judge(replies):
        pairs = zip(PROMPTS, replies, strict=True)
        return max(max(oracle.regrets(prompt, reply)) for prompt, reply in pairs)

    return judge


def test_layers_are_of_all_kinds(answers):
    assert len(answers["parts"]) == 3 and [len(heads) for heads in answers["parts"]].count(2) > 0
    assert any(order is not None for order in answers["orders"]), answers["orders"]
    assert {sum(heads) for heads in answers["parts"]} == {4}


def test_answers_are_the_oracles(answers, worst_regret):
    assert [len(reply) for reply in answers["cold"]] == [TOKENS] * len(PROMPTS)
    assert worst_regret(answers["cold"]) <= TIE


def test_planted_faults_are_seen(answers, worst_regret):
    found = {fault: worst_regret(said) for fault, said in answers["faults"].items()}
    assert found.keys() > OWN_FAULTS.keys()
    assert {fault: regret for fault, regret in found.items() if regret <= TIE} == {}


def test_answers_are_alike_after_hits_and_preemption(uneven):
    model, dictionary = map(str, uneven)
    said = in_a_process(answer_alike, model, {"dictionary": dictionary} | SETTINGS)
    assert said["preempted"] > 0 and said["hits"] == [128]
    assert said["again"] == said["alone"][:1]
    assert said["crowded"] == said["alone"]
