"""One engine reads prompts, another answers from its cache: as from a prefix hit, or not at all. Needs `nixl`."""

import copy
import dataclasses

import pytest

pytest.importorskip("vllm")
pytest.importorskip("nixl")
from disaggregated import Engine
from draft_answers import write_eagle3
from engines import FAULT_APART, ON_A_GPU, WITHIN, make_tokens, on_this_device

from vllm_lexico.dictionary.file import load_dictionary, read_checksum

LENGTHS = (100, 300, 411)
WHOLE = [0, 256, 384]


@pytest.fixture(scope="module")
def another_dictionary(strong_dictionary, tmp_path_factory):
    """The same atoms in another file: what counts is the file."""
    dictionary = load_dictionary(strong_dictionary)
    path = tmp_path_factory.mktemp("another") / "another.safetensors"
    dataclasses.replace(dictionary, info=dataclasses.replace(dictionary.info, seed=dictionary.info.seed + 1)).save(path)
    return path


@pytest.fixture(scope="module")
def answers(strong_llama, strong_dictionary, another_dictionary):
    """What the engine that decodes answers: told, with blocks in a wrong order, with another dictionary, and alone."""
    prompts = [make_tokens(length, length) for length in LENGTHS]
    lexico, settings = {"sparsity": 3, "dictionary": str(strong_dictionary)}, on_this_device()
    reads = Engine(str(strong_llama), "kv_producer", lexico, settings)
    answers = Engine(str(strong_llama), "kv_consumer", lexico, settings)
    try:
        found = {"told": answers.call("ask", prompts, reads.call("prefill", prompts))}
        assert answers.call("reset")
        found["cold"] = answers.call("ask", prompts)
        found["hit"] = answers.call("ask", prompts)
        assert answers.call("reset")
        wrong = copy.deepcopy(reads.call("prefill", prompts))
        for one in wrong:
            one["remote_block_ids"] = (one["remote_block_ids"][0][::-1], one["remote_block_ids"][1])
        found["wrong order"] = answers.call("ask", prompts, wrong)
        answers.close()
        lexico["dictionary"] = str(another_dictionary)
        answers = Engine(str(strong_llama), "kv_consumer", lexico, settings)
        found["another dictionary"] = answers.call("ask", prompts[1:2], reads.call("prefill", prompts[1:2]))
    finally:
        reads.close()
        answers.close()
    return found


def gap(a, b):
    if a["tokens"] != b["tokens"]:
        return float("inf")
    pairs = zip(a["logprobs"], b["logprobs"], strict=True)
    return max(abs(x - y) for one, other in pairs for x, y in zip(one, other, strict=True))


def test_what_another_engine_read_is_answered_as_a_prefix_hit(answers):
    told = answers["told"]
    assert told["external"] == sum(WHOLE) and answers["hit"]["cached"] == WHOLE and answers["cold"]["external"] == 0
    assert gap(told, answers["hit"]) <= WITHIN


def test_blocks_in_a_wrong_order_are_seen(answers):
    assert answers["wrong order"]["external"] == sum(WHOLE)
    assert gap(answers["wrong order"], answers["hit"]) > FAULT_APART


def test_another_dictionary_is_refused_with_both_hashes(answers, strong_dictionary, another_dictionary):
    refused = answers["another dictionary"]
    assert refused["ended"] == ["error"]
    lines = [line for line in refused["said"] if "compatibility hash mismatch" in line]
    hashes = [read_checksum(one) for one in (strong_dictionary, another_dictionary)]
    assert lines and all(one in line for line in lines for one in hashes)


def test_drafts_go_on_from_what_another_engine_read(strong_llama, tmp_path):
    head = {"method": "eagle3", "model": str(write_eagle3(strong_llama, tmp_path)), "num_speculative_tokens": 3}
    settings, prompts = (
        on_this_device() | {"speculative_config": head},
        [make_tokens(length, length) for length in LENGTHS],
    )
    reads = Engine(str(strong_llama), "kv_producer", {"codec": "exact"}, settings)
    answers = Engine(str(strong_llama), "kv_consumer", {"codec": "exact"}, settings)
    try:
        told = answers.call("ask", prompts, reads.call("prefill", prompts))
        assert answers.call("reset")
        cold = answers.call("ask", prompts)
        hit = answers.call("ask", prompts)
    finally:
        reads.close()
        answers.close()
    assert told["external"] == sum(WHOLE) and cold["external"] == 0
    assert gap(told, hit if ON_A_GPU else cold) <= WITHIN
