"""The engine end to end: with the exact codec LEXICO answers as vLLM's backend on the CPU does, in every situation.

The model is tiny, with strong random weights, and computes in float32, so that what is left between the two is the
order of additions. On a GPU `benchmarks/exactness.py` runs the same scenarios on real models, against two backends.
"""

import sys
from collections import defaultdict

import pytest

pytest.importorskip("vllm")
from engines import run_scenarios
from faults import FAULTS
from oracle import Oracle
from processes import in_a_process

from vllm_lexico.config import LexicoConfig
from vllm_lexico.dictionary.file import load_dictionary

# Log-probabilities in float32; bfloat16 would differ by 1e-2.
MEAN_GAP, MAX_GAP = 2e-5, 5e-4
TIE = 1e-3
SCENARIOS = ("plain", "shared_prefixes", "multi_turn", "crowd", "chunked", "same_step", "preempted")
BACKENDS = ("CPU_ATTN", "LEXICO")


@pytest.fixture(scope="session")
def exactness(root, tmp_path_factory):
    """The benchmark's module."""
    sys.path.insert(0, str(root / "benchmarks"))
    import exactness

    return exactness


@pytest.fixture(scope="session")
def answers(root, exactness, strong_llama, strong_dictionary):
    """What each backend answers in every scenario, and LEXICO with faults, see `run_scenarios`."""
    lexico = {"dictionary": str(strong_dictionary)}
    found = {backend: defaultdict(dict) for backend in BACKENDS}
    for backend, said in found.items():
        for name in exactness.ENGINES:
            if name == "codes" and backend != "LEXICO":
                continue
            case = str(root / "benchmarks"), name, str(strong_llama), backend, lexico
            for fault, scenarios in in_a_process(run_scenarios, *case).items():
                said[fault] |= scenarios
    return found


@pytest.fixture(scope="session")
def compared(answers, exactness):
    """Distances between the backends in a scenario; with a fault as far as the short answers go."""

    def compare(scenario, fault="whole"):
        expected, said = (answers["CPU_ATTN"]["whole"], answers["LEXICO"][fault])
        pairs = zip(expected[scenario]["answers"], said[scenario]["answers"], strict=True)
        short = [[{key: row[key][: len(b["tokens"])] for key in row} for row in (a, b)] for a, b in pairs]
        return exactness.compare([a for a, _ in short], [b for _, b in short])

    return compare


@pytest.fixture(scope="session")
def worst_regret(strong_llama, strong_dictionary, exactness):
    """By how much the oracle minds answers from codes, in nats: of the first half, requests that were alone."""
    tables = load_dictionary(strong_dictionary)

    def judge(said):
        from transformers import AutoTokenizer

        settings = LexicoConfig.from_additional_config({"lexico": exactness.SMALLEST_WINDOW})
        oracle = Oracle.of(strong_llama, dictionary=tables, settings=settings)
        tokens = AutoTokenizer.from_pretrained(strong_llama)(exactness.TEXT[: 1 << 17])["input_ids"]
        alone = said["answers"][: len(said["answers"]) // 2]
        return max(
            max(oracle.regrets(_passage(tokens, 500 + i, 150 + 100 * i), reply["tokens"]))
            for i, reply in enumerate(alone)
        )

    return judge


def _passage(tokens, seed, length):
    import random

    start = random.Random(seed).randrange(len(tokens) - length)
    return tokens[start : start + length]


def check(row):
    assert row["tokens"] >= 32
    assert row["mean"] <= MEAN_GAP and row["max"] <= MAX_GAP, row
    assert row["worst_parting"] <= TIE, row


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_exact_codec_answers_as_cpu_attn(compared, scenario):
    check(compared(scenario))


@pytest.mark.parametrize("scenario", ["shared_prefixes", "multi_turn"])
def test_prefix_hits_are_as_many(answers, scenario):
    counts = [answers[backend]["whole"][scenario]["counts"]["hits"] for backend in BACKENDS]
    assert counts[1] >= counts[0] > 0


def test_requests_were_preempted(answers):
    assert all(answers[backend]["whole"]["preempted"]["counts"]["preemptions"] > 0 for backend in BACKENDS)


def test_codes_answer_alike_alone_and_in_a_crowd_and_as_the_oracle(answers, exactness, worst_regret):
    said = answers["LEXICO"]["whole"]["alone_and_in_crowd"]
    half = len(said["answers"]) // 2
    check(exactness.compare(said["answers"][:half], said["answers"][half:]))
    assert worst_regret(said) <= TIE


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(answers, compared, worst_regret, fault):
    """Each check above fails for an engine whose cache is broken."""
    distances = {scenario: compared(scenario, fault) for scenario in SCENARIOS}
    unseen = [name for name, row in distances.items() if row["max"] <= MAX_GAP and row["worst_parting"] <= TIE]
    assert unseen == []
    assert worst_regret(answers["LEXICO"][fault]["alone_and_in_crowd"]) > TIE
