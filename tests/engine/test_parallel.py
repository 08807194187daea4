"""Ranks on two processes of vLLM's CPU build, with experts shared out too: they answer as its backend, or the oracle.

On GPUs `benchmarks/parallel.py` asks the same of real models, with torch.compile and CUDA graphs.
"""

import json
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
from oracle import Oracle
from processes import in_a_process
from ranks import FIRST_HEADS, ask_ranks

from vllm_lexico.config import LexicoConfig
from vllm_lexico.dictionary.file import load_dictionary

WIPED = "wiped pages"
TENSOR, PIPELINE = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
EXPERTS = TENSOR | {"enable_expert_parallel": True}
NO_WINDOW = {"window": 0}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
# Log-probabilities in float32, and by how much the oracle may mind an answer's token, in nats.
MEAN_GAP, MAX_GAP, TIE = 2e-5, 5e-4, 1e-3


@pytest.fixture(scope="module")
def exact(root):
    """The benchmark's comparisons."""
    sys.path.insert(0, str(root / "benchmarks"))
    from bench import parallel_exact

    return parallel_exact


@pytest.fixture(scope="module")
def coded(strong_llama, strong_dictionary, load_benchmark, write_letters_model, tmp_path_factory):
    """Models with their dictionaries: one with a KV head per rank, and one with fewer KV heads than ranks."""
    changes = {"num_attention_heads": 6, "hidden_size": 192, "intermediate_size": 256, "initializer_range": 0.15}
    one_head = write_letters_model(tmp_path_factory.mktemp("one-head"), 2, head_dim=64, **changes)
    shapes = load_benchmark("bench/shapes")
    shape = shapes.write_model(tmp_path_factory.mktemp("shape"), json.loads((one_head / "config.json").read_text()))
    dictionary = shapes.write_random_dictionary(shape, atoms=256)
    return {"codes": (strong_llama, strong_dictionary), "codes, one KV head": (one_head, dictionary)}


@pytest.fixture(scope="module")
def with_experts(write_letters_model, tmp_path_factory):
    """A Mixtral, half of whose experts are each rank's."""
    changes = {"hidden_size": 256, "intermediate_size": 128, "initializer_range": 0.15}
    return write_letters_model(tmp_path_factory.mktemp("experts") / "model", 2, 2, experts=4, head_dim=64, **changes)


PEERS = {"exact": "peer", "stages": "peer", "experts": "peer with experts"}
FAULTS = {"exact": WIPED, "experts": WIPED, "stages": WIPED, "codes": FIRST_HEADS, "codes, one KV head": WIPED}


@pytest.fixture(scope="module")
def answers(root, strong_llama, with_experts, coded):
    """What each engine answers, and with a fault, by its name."""
    exactly, both = {"codec": "exact"} | NO_WINDOW, ["again", "repetitive"]
    cases = {
        "peer": (strong_llama, "CPU_ATTN", {}, TENSOR | {"block_size": 128}, both),
        "exact": (strong_llama, "LEXICO", exactly, TENSOR | {"speculative_config": DRAFTS}, both),
        "stages": (strong_llama, "LEXICO", exactly, PIPELINE, ["again"]),
        "peer with experts": (with_experts, "CPU_ATTN", {}, EXPERTS | {"block_size": 128}, ["again"]),
        "experts": (with_experts, "LEXICO", exactly, EXPERTS, ["again"]),
    }
    for name, (model, dictionary) in coded.items():
        cases[name] = (model, "LEXICO", {"dictionary": str(dictionary)} | NO_WINDOW, TENSOR, ["repetitive"])
    found = {}
    for name, (model, backend, lexico, settings, scenarios) in cases.items():
        given = str(root / "benchmarks"), str(model), backend, lexico, settings
        found[name] = in_a_process(ask_ranks, *given, scenarios=scenarios, fault=FAULTS.get(name))
    return found


@pytest.fixture(scope="module")
def worst_regret(coded, exact):
    """By how much the oracle minds answers of an engine with codes, in nats."""
    import exactness
    from transformers import AutoTokenizer

    def judge(name, said):
        model, dictionary = coded[name]
        asked = []

        def answer(prompts, _):
            asked.extend(prompts)
            return []

        text_tokens = AutoTokenizer.from_pretrained(model)(exactness.TEXT[: 1 << 17])["input_ids"]
        place = SimpleNamespace(text_tokens=text_tokens, answer=answer, count=lambda name: 0)
        place.passage = lambda seed, length: exactness.Engine.passage(place, seed, length)
        exact.repetitive(place, 1)
        settings = LexicoConfig.from_additional_config({"lexico": NO_WINDOW})
        oracle = Oracle.of(model, dictionary=load_dictionary(dictionary), settings=settings)
        pairs = zip(asked, said["repetitive"]["answers"], strict=True)
        return max(max(oracle.regrets(prompt, reply["tokens"])) for prompt, reply in pairs)

    return judge


@pytest.mark.parametrize("name", PEERS)
def test_the_exact_codec_on_two_ranks_answers_as_cpu_attn(answers, exact, name):
    for scenario, said in answers[name]["whole"].items():
        row = exact.compare(said["answers"], answers[PEERS[name]]["whole"][scenario]["answers"])
        assert row["tokens"] >= 12, (scenario, row)
        assert row["mean"] <= MEAN_GAP and row["max"] <= MAX_GAP and row["worst_parting"] <= TIE, (scenario, row)


@pytest.mark.parametrize("name", ["codes", "codes, one KV head"])
def test_codes_on_two_ranks_answer_as_the_oracle(answers, worst_regret, name):
    assert worst_regret(name, answers[name]["whole"]) <= TIE


def test_prompts_were_found_in_the_cache_and_tokens_drafted(answers, exact):
    hits = {name: exact.count(answers[name]["whole"], "hits") for name in (*PEERS, *PEERS.values())}
    assert set(hits.values()) == {256 + 384 + 512}
    drafted = {name: exact.count(answers[name]["whole"], "drafted") for name in ("peer", "exact")}
    assert drafted["exact"] > drafted["peer"] == 0


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_seen(answers, exact, worst_regret, name):
    faulty = answers[name][FAULTS[name]]
    if name.startswith("codes"):
        assert worst_regret(name, faulty) > TIE
    else:
        row = exact.compare(faulty["again"]["answers"], answers[PEERS[name]]["whole"]["again"]["answers"])
        assert row["max"] > MAX_GAP or row["worst_parting"] > TIE, row
