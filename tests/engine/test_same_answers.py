"""The same request cold and from the prefix cache: answers differ, but for the setting "same"."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

FOLDER = Path(__file__).parent
SMALL_CHUNKS = {"max_num_batched_tokens": 96, "max_num_seqs": 4}
CASES = {"codes": ("codes", {}), "same": ("same", {}), "same, chunks": ("same", SMALL_CHUNKS)}


@pytest.fixture(scope="module")
def answers(strong_llama, strong_dictionary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("same")
    asked, said = folder / "cases.json", folder / "answers.json"
    lexico = {"dictionary": str(strong_dictionary), "sparsity": 3}
    cases = [
        {"model": str(strong_llama), "lexico": lexico | {"prefix_hits": hits}, "settings": settings}
        for hits, settings in CASES.values()
    ]
    asked.write_text(json.dumps(cases))
    result = subprocess.run([sys.executable, FOLDER / "run_same.py", asked, said], capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    return dict(zip(CASES, json.loads(said.read_text()), strict=True))


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
