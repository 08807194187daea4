"""Every setting through a whole engine: with the exact codec none changes an answer, with codes each one runs.

A tiny model with random weights in float32; each engine starts in a second or two.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")

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
    "codes and drafts": ({"prefix_hits": "window"}, {"speculative_config": DRAFTS}),
}


@pytest.fixture(scope="module")
def dictionary(tiny_llama, load_benchmark):
    """A dictionary of random atoms for the tiny model."""
    return load_benchmark("bench/shapes").write_random_dictionary(tiny_llama, atoms=128)


@pytest.fixture(scope="module")
def answers(tiny_llama, dictionary, tmp_path_factory):
    """What CPU_ATTN and every engine of the two tables answer, by name."""
    base = {"model": str(tiny_llama)}
    cases = {"CPU_ATTN": base | {"backend": "CPU_ATTN", "lexico": {}, "settings": {"block_size": 128}}}
    for table, always in ((EXACT, {"codec": "exact"}), (CODED, {"dictionary": str(dictionary)})):
        for name, (lexico, settings) in table.items():
            cases[name] = base | {"backend": "LEXICO", "lexico": always | lexico, "settings": settings}
    with_drafts = [name for name, case in cases.items() if "speculative_config" in case["settings"]]
    found = {}
    for names in ([name for name in cases if name not in with_drafts], *([name] for name in with_drafts)):
        folder = tmp_path_factory.mktemp("engines")
        asked, said = folder / "cases.json", folder / "answers.json"
        asked.write_text(json.dumps([cases[name] for name in names]))
        script = Path(__file__).with_name("run_engines.py")
        result = subprocess.run([sys.executable, script, asked, said], env=os.environ, capture_output=True, text=True)
        assert result.returncode == 0, f"{names}: {(result.stdout + result.stderr)[-4000:]}"
        found |= dict(zip(names, json.loads(said.read_text()), strict=True))
    return found


@pytest.mark.parametrize("name", EXACT)
def test_exact_codec_answers_alike_whatever_the_settings(answers, name):
    assert answers[name] == answers["CPU_ATTN"]


@pytest.mark.parametrize("name", CODED)
def test_codes_give_all_tokens_asked_for(answers, name):
    assert [len(reply) for said in answers[name] for reply in said] == [40] * 15
    assert all(0 <= token < 512 for said in answers[name] for reply in said for token in reply)
