"""Engines whose cache comes back from host memory answer as they do after a prefix hit without its window."""

import pytest

pytest.importorskip("vllm")
from draft_answers import write_draft_model, write_eagle3
from engines import FAULT_APART, ON_A_GPU, WITHIN, on_this_device
from offloaded import LENGTHS, answer_from_host
from processes import in_a_process

CASES = {"OffloadingConnector": "codes", "SimpleCPUOffloadConnector": "exact"}
WHOLE = [length // 128 * 128 for length in LENGTHS]
WHOLE[-1] -= 128  # a prompt's last block is never taken whole
FAULTS = ("lose_sinks", "lose_codes")


@pytest.fixture(scope="module")
def answers(strong_llama, strong_dictionary):
    """By connector, see `answer_from_host`."""
    settings = {"exact": {"codec": "exact"}, "codes": {"sparsity": 3, "dictionary": str(strong_dictionary)}}
    return {
        connector: in_a_process(answer_from_host, str(strong_llama), connector, settings[codec], on_this_device())
        for connector, codec in CASES.items()
    }


def gap(a, b):
    """The largest difference of two rounds of answers, infinite where tokens differ."""
    if a["tokens"] != b["tokens"]:
        return float("inf")
    pairs = zip(a["logprobs"], b["logprobs"], strict=True)
    return max(abs(x - y) for one, other in pairs for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("connector", CASES)
def test_what_comes_back_is_what_was_there(answers, connector):
    said = answers[connector]
    assert said["cold"]["external"] == said["hit"]["external"] == 0 and said["hit"]["cached"] == WHOLE
    assert said["host"]["external"] == sum(WHOLE) and said["host"]["cached"] == WHOLE
    assert gap(said["host"], said["hit"]) <= WITHIN
    if CASES[connector] == "exact" and not ON_A_GPU:  # bfloat16 rounds a step's own tokens otherwise
        assert gap(said["host"], said["cold"]) <= WITHIN


@pytest.mark.parametrize("connector", CASES)
def test_the_rest_follows_a_local_hit(answers, connector):
    said = answers[connector]
    assert said["start"]["external"] == 128 * len(LENGTHS)
    assert said["rest"]["external"] == sum(WHOLE) - 128 * len(LENGTHS) and said["rest"]["cached"] == WHOLE
    assert gap(said["rest"], said["hit"]) <= WITHIN


@pytest.mark.parametrize("connector", CASES)
def test_host_memory_holds_codes_and_sinks_alone(answers, connector):
    """Blocks of codes, and a block for each page of sinks."""
    said = answers[connector]
    blocks, sinks = sum(length // 128 for length in LENGTHS), len(LENGTHS)
    assert blocks + sinks <= said["stored"] <= blocks + 4 * sinks


@pytest.mark.parametrize("connector", CASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(answers, connector, fault):
    said = answers[connector]
    assert said[fault]["external"] == sum(WHOLE)
    assert gap(said[fault], said["hit"]) > FAULT_APART


@pytest.fixture(scope="module")
def drafting(strong_llama, tmp_path_factory):
    """The same where a model drafts, whose raw pages lie in the blocks of codes."""
    nearly_right = write_draft_model(strong_llama, tmp_path_factory.mktemp("nearly-right"), noise=0.02)
    head = write_eagle3(strong_llama, tmp_path_factory.mktemp("head"))
    drafts = [{"method": "draft_model", "model": str(nearly_right)}, {"method": "eagle3", "model": str(head)}]
    found = {}
    for connector, one in zip(CASES, drafts, strict=True):
        settings = on_this_device() | {"speculative_config": one | {"num_speculative_tokens": 3}}
        case = str(strong_llama), connector, {"codec": "exact"}, settings
        found[connector] = in_a_process(answer_from_host, *case)
    return found


@pytest.mark.parametrize("connector", CASES)
def test_drafts_come_back_with_codes(drafting, connector):
    """EAGLE's last block is never taken whole, so the shorter prompt lacks one more."""
    said, lacks = drafting[connector], {"SimpleCPUOffloadConnector": 128}.get(connector, 0)
    assert said["host"]["external"] == sum(WHOLE) - lacks == said["hit"]["external"] + sum(said["hit"]["cached"])
    assert gap(said["host"], said["hit"]) <= WITHIN
    assert said["host"]["accepted"] == said["hit"]["accepted"] and (said["host"]["accepted"] > 0) == (not lacks)
    if not ON_A_GPU:
        assert gap(said["host"], said["cold"]) <= WITHIN and said["host"]["accepted"] == said["cold"]["accepted"]
    for fault in FAULTS:
        assert gap(said[fault], said["hit"]) > FAULT_APART
