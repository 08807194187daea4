"""Families of models crossed with settings that interact: with the exact codec none of them changes an answer.

Windows with learned sinks, soft caps, no positions, chunks, Mamba2 with experts and beside each coded layer; in each an
engine whose pool is taken away while requests are answered. `python benchmarks/family_exact.py` crosses every family
with every setting.
"""

import pytest

pytest.importorskip("vllm")
from crossed_answers import answer_in_turn
from faults import FAULTS
from processes import in_a_process
from tiny_families import FAMILIES, write_checkpoint

CROSSED = {  # vLLM's build for CPUs has no kernel for drafts beside states
    "gpt-oss": "same hits, drafts, few pages",
    "Gemma 2": "few pages, small chunks, window hits",
    "Llama 4": "drafts in small chunks, few pages",
    "Granite 4": "few pages, small chunks, window hits",
    "Falcon-H1": "few pages",
    "Cohere2": "drafts in small chunks, few pages",
}


@pytest.fixture(scope="module")
def crossed(import_benchmark):
    import_benchmark("exactness")
    from bench import crossed

    return crossed


@pytest.fixture(scope="module", params=CROSSED)
def answers(request, root, tmp_path_factory):
    """In which numbers a family computes, what vLLM answers and what LEXICO does."""
    family = FAMILIES[request.param]
    model = write_checkpoint(family, tmp_path_factory.mktemp("crossed"))
    case = str(root / "benchmarks"), str(model), family.dtype, CROSSED[request.param], str(root / "tests" / "engine")
    return family.dtype, *in_a_process(answer_in_turn, *case)


def test_answers_are_vllms(crossed, answers):
    dtype, theirs, ours = answers
    row, wrong = crossed.judge(ours["answers"], theirs["answers"], None, dtype)
    assert not wrong, row
    assert row["tokens"] >= (120 if dtype == "float32" else 60)
    assert sum(ours["preemptions"]) > 0 and max(ours["hits"][3:]) >= 256


def test_empty_code_pages_are_seen(crossed, answers):
    dtype, theirs, ours = answers
    apart, seen = crossed.judge_fault(ours["faulty"], ours["answers"], theirs["answers"], None, dtype)
    assert "wiped pages" in FAULTS and seen, apart


def test_every_setting_of_the_settings_tests_is_crossed(crossed):
    """By what is set, whatever it is called there."""
    from test_settings import EXACT

    ours = [set(setting.lexico) | set(setting.engine) for setting in crossed.SETTINGS.values()]
    for name, (lexico, settings) in EXACT.items():
        assert any(set(lexico) | set(settings) <= one for one in ours), name
