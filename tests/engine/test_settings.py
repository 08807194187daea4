"""Every setting through a whole engine: with the exact codec none changes an answer, with codes each is the oracle's.

A tiny model with strong random weights in float32; each engine starts in a second or two. Each engine answers again
with faults planted into its cache, and each of these answers must fail the check that the others pass.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
from faults import FAULTS
from oracle import Oracle
from run_engines import make_irregular_prompts, make_prompts

from vllm_lexico.config import LexicoConfig
from vllm_lexico.dictionary.file import load_dictionary

FOLDER = Path(__file__).parent
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
    "drafts in small chunks": ({"window": 0}, {"speculative_config": DRAFTS} | SMALL_CHUNKS),
}
CODED = {
    "few atoms": ({"sparsity": 3}, {}),
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
def answers(strong_llama, strong_dictionary, tmp_path_factory):
    """What CPU_ATTN and every engine of the two tables answer, by name."""
    base = {"model": str(strong_llama)}
    cases = {"CPU_ATTN": base | {"backend": "CPU_ATTN", "lexico": {}, "settings": {"block_size": 128}}}
    for table, always in ((EXACT, {"codec": "exact"}), (CODED, {"dictionary": str(strong_dictionary)})):
        for name, (lexico, settings) in table.items():
            cases[name] = base | {"backend": "LEXICO", "lexico": always | lexico, "settings": settings}
    with_drafts = [name for name, case in cases.items() if "speculative_config" in case["settings"]]
    found = {}
    for names in ([name for name in cases if name not in with_drafts], *([name] for name in with_drafts)):
        folder = tmp_path_factory.mktemp("engines")
        asked, said = folder / "cases.json", folder / "answers.json"
        asked.write_text(json.dumps([cases[name] for name in names]))
        environment = os.environ | {"PYTHONPATH": str(FOLDER)}
        command = [sys.executable, FOLDER / "run_engines.py", asked, said]
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, f"{names}: {(result.stdout + result.stderr)[-4000:]}"
        found |= dict(zip(names, json.loads(said.read_text()), strict=True))
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
    assert [len(reply) for said in rounds for reply in said] == [40] * 15
    # The last prompt begins as the one before it, whose blocks it hits, which the oracle does not follow.
    assert worst_regret(name, make_prompts()[:-1], rounds[0][:-1]) <= (TIE_WITH_DRAFTS if "drafts" in name else TIE)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen_with_the_exact_codec(answers, fault):
    sound = answers["CPU_ATTN"]["sound"]
    assert {name for name in EXACT if answers[name]["faults"][fault] == sound} <= LITTLE_FROM_CODES


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen_with_codes(answers, worst_regret, fault):
    regrets = {name: worst_regret(name, make_irregular_prompts(), answers[name]["faults"][fault]) for name in CODED}
    limits = {name: TIE_WITH_DRAFTS if "drafts" in name else TIE for name in CODED}
    assert {name: regret for name, regret in regrets.items() if regret <= limits[name]} == {}
