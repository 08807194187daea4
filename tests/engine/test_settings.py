"""Every setting through a whole engine: with the exact codec none changes an answer, with codes each is the oracle's.

A tiny model with strong random weights in float32; each engine starts in a second or two. Each engine answers again
with faults planted into its cache, and each of these answers must fail the check that the others pass.
"""

import pytest

pytest.importorskip("vllm")
from engines import COLD_TOKENS, WARM_TOKENS, answer_thrice, make_irregular_prompts, make_prompts
from faults import FAULTS
from oracle import Oracle
from processes import in_a_process

from vllm_lexico.config import LexicoConfig
from vllm_lexico.dictionary.file import load_dictionary

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SMALL_CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
EXACT = {
    "defaults": ({}, {}),
    "no window, no sinks": ({"window": 0, "sinks": 0}, {}),
    "wide window, many sinks": ({"window": 200, "sinks": 100}, {}),
    "window hits": ({"prefix_hits": "window"}, {}),
    "blocks of 64": ({}, {"block_size": 64}),
    "blocks of 256": ({}, {"block_size": 256}),
    "small chunks": ({"window": 0}, SMALL_CHUNKS),
    "no prefix caching": ({}, {"enable_prefix_caching": False}),
    "drafts": ({}, {"speculative_config": DRAFTS}),
    "small steps coded later": ({"coded_later": 50, "window": 0}, {"speculative_config": DRAFTS} | SMALL_CHUNKS),
    "drafts in small chunks": ({"window": 0}, {"speculative_config": DRAFTS} | SMALL_CHUNKS),
}
CODED = {
    "few atoms": ({"sparsity": 3}, {}),
    "few atoms, coded later": ({"sparsity": 3, "coded_later": 8192}, {}),
    "uneven": ({"sparsity": 7, "uneven": [3, 11]}, {}),
    "fewer for values": ({"sparsity": {"key": 15, "value": 4}}, {}),
    "paper": ({"codec": "paper", "sparsity": 7}, {}),
    "relative error": ({"relative_error": 0.5}, {}),
    "many atoms, no tail": ({"sparsity": 31, "window": 0, "sinks": 0}, {"block_size": 64}),
    "codes and drafts": ({"sparsity": 31, "prefix_hits": "window"}, {"speculative_config": DRAFTS}),
}
# With these a request of 740 tokens reads so little from codes that a wrong page need not change its next tokens.
LITTLE_FROM_CODES = {"wide window, many sinks", "blocks of 256"}
# The best logit above that of an answer's token, in nats. Float32 leaves near ties; where drafts are verified, the
# window begins up to three tokens earlier than the oracle's.
TIE, TIE_WITH_DRAFTS = 1e-3, 0.5


@pytest.fixture(scope="module")
def answers(strong_llama, strong_dictionary):
    """What CPU_ATTN and every engine of the two tables answer, by name."""
    plain = {"backend": "CPU_ATTN", "lexico": {}, "settings": {"block_size": 128}}
    found = {"CPU_ATTN": in_a_process(answer_thrice, str(strong_llama), **plain)}
    for table, always in ((EXACT, {"codec": "exact"}), (CODED, {"dictionary": str(strong_dictionary)})):
        for name, (lexico, settings) in table.items():
            case = {"backend": "LEXICO", "lexico": always | lexico, "settings": settings}
            found[name] = in_a_process(answer_thrice, str(strong_llama), **case)
    return found


@pytest.fixture(scope="module")
def worst_regret(strong_llama, strong_dictionary):
    """By how much the oracle minds some cold answers of a case of CODED: its largest regret in nats."""
    tables = load_dictionary(strong_dictionary)

    def judge(name: str, prompts: list[list[int]], replies: list[list[int]]) -> float:
        lexico, settings = CODED[name]
        oracle = Oracle.of(
            strong_llama,
            dictionary=tables,
            settings=LexicoConfig.from_additional_config({"lexico": lexico}),
            block_tokens=settings.get("block_size", 128),
            num_draft_tokens=settings.get("speculative_config", {}).get("num_speculative_tokens", 0),
        )
        asked = zip(prompts, replies, strict=True)
        return max(max(oracle.regrets(prompt, reply)) for prompt, reply in asked)

    return judge


@pytest.mark.parametrize("name", EXACT)
def test_exact_codec_answers_alike_whatever_the_settings(answers, name):
    assert answers[name]["rounds"] == answers["CPU_ATTN"]["rounds"]
    assert answers[name]["sound"] == answers["CPU_ATTN"]["sound"]


@pytest.mark.parametrize("name", CODED)
def test_codes_answer_as_the_oracle_does(answers, worst_regret, name):
    rounds = answers[name]["rounds"]
    lengths = [len(reply) for said in rounds for reply in said]
    assert lengths == [COLD_TOKENS] * 5 + [WARM_TOKENS] * 10
    # The last prompt begins as the one before it, whose blocks it hits, which the oracle does not follow.
    assert worst_regret(name, make_prompts()[:-1], rounds[0][:-1]) <= (TIE_WITH_DRAFTS if "drafts" in name else TIE)


def test_codes_answer_alike_whenever_they_are_made(answers):
    """But for the last prompt: in one step with the one before it, it hits that one's blocks only if they are coded."""
    at_once, later = (answers[name]["rounds"] for name in ("few atoms", "few atoms, coded later"))
    assert [said[:-1] for said in at_once] == [said[:-1] for said in later]


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen_with_the_exact_codec(answers, fault):
    sound = answers["CPU_ATTN"]["sound"]
    assert {name for name in EXACT if answers[name]["faults"][fault] == sound} <= LITTLE_FROM_CODES


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen_with_codes(answers, worst_regret, fault):
    regrets = {name: worst_regret(name, make_irregular_prompts(), answers[name]["faults"][fault]) for name in CODED}
    limits = {name: TIE_WITH_DRAFTS if "drafts" in name else TIE for name in CODED}
    assert {name: regret for name, regret in regrets.items() if regret <= limits[name]} == {}
