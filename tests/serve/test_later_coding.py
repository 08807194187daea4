"""Coding that waits for the next step writes what coding at once does, before anything reads it."""

import pytest
import torch

pytest.importorskip("vllm")
import step_runner

from vllm_lexico.config import LexicoConfig
from vllm_lexico.serve import later_coding

# A prompt in two chunks, another beside its second one, and steps of decode and of a third prompt beside them.
STEPS = [[(190, 0)], [(110, 190), (170, 0)], [(1, 300), (1, 170)], [(1, 301), (1, 171), (90, 0)], [(1, 302), (1, 172)]]
SHAPE = step_runner.Shape(
    4, 2, 64, 3, atoms=32, dtype=torch.float32, block_tokens=64, max_model_len=512, max_requests=4
)


def make(base_config, **changes):
    return step_runner.Runner(base_config, SHAPE._replace(**changes), num_pages=1200)


def codes_of(runner):
    """A copy of both layers' code pages."""
    caches = [runner.layers[name].impl._cache.whole for name in runner.names]
    return torch.stack([cache.code_pages[1 : 1 + runner.num_code_pages] for cache in caches])


def run(base_config, **changes):
    """What each step answers, and the codes of both layers after each."""
    runner, answers, pages = make(base_config, **changes), [], []
    for seed, requests in enumerate(STEPS):
        answers.append(runner.step(requests, seed))
        pages.append(codes_of(runner))
    return answers, pages


@pytest.fixture(scope="module")
def at_once(base_config):
    return run(base_config)


@pytest.mark.parametrize("codec", ["packed16", "exact"])
def test_steps_answer_alike_and_leave_the_same_codes(base_config, codec):
    """The first step's tokens are not coded when it ends; those of the others are, when the next step has begun."""
    answers, pages = run(base_config, codec=codec)
    later_answers, later_pages = run(base_config, codec=codec, coded_later=300)
    assert all(torch.equal(*pair) for pair in zip(answers, later_answers, strict=True))
    assert later_pages[0].count_nonzero() == 0 < pages[0].count_nonzero()
    assert not torch.equal(later_pages[1], pages[1]) and not torch.equal(later_pages[3], pages[3])
    assert torch.equal(later_pages[2], pages[2]) and torch.equal(later_pages[4], pages[4])


def test_larger_steps_are_coded_at_once(base_config, at_once):
    _, pages = run(base_config, coded_later=200)  # of the prefill steps, the second has 280 tokens
    assert [torch.equal(*pair) for pair in zip(pages, at_once[1], strict=True)] == [False, True, True, False, True]


def test_coding_that_is_forgotten_is_seen(base_config, at_once, monkeypatch):
    monkeypatch.setattr(later_coding.LaterCoding, "code", lambda self: self._waiting.clear())
    answers, _ = run(base_config, coded_later=300)
    assert [torch.equal(*pair) for pair in zip(answers, at_once[0], strict=True)] == [True] + [False] * 4


def test_coding_that_comes_after_the_steps_own_lists_is_seen(base_config, monkeypatch):
    """A step's lists lie where the last one's did."""
    code, found = later_coding.LaterCoding.code, []
    for begin in (code, lambda _: None):
        monkeypatch.setattr(later_coding.LaterCoding, "code", begin)
        runner = make(base_config, coded_later=300)
        runner.step([(190, 0)], 0)
        runner.step([(100, 0)], 1)
        code(runner.codes._later)
        found.append(codes_of(runner))
    assert not torch.equal(*found)


def test_nothing_is_written_to_pages_that_were_given_back(base_config):
    """vLLM tries CUDA graphs with a few pages, frees them and allocates all."""
    runner = make(base_config, coded_later=300)
    runner.step(STEPS[0])
    before, old = codes_of(runner), [runner.layers[name].impl._cache.whole for name in runner.names]
    for name in runner.names:
        layer = runner.layers[name]
        layer.kv_cache, runner.layers[layer.impl.tail_name].kv_cache = runner._pages(1200)
    runner.step(STEPS[1])
    after = torch.stack([cache.code_pages[1 : 1 + runner.num_code_pages] for cache in old])
    assert torch.equal(after, before)


def test_it_is_refused_where_a_step_reads_its_own_codes():
    with pytest.raises(ValueError, match="remove coded_later"):
        LexicoConfig(coded_later=8192, prefix_hits="same")


def test_memory_profiling_sees_what_is_kept(base_config):
    """Without metadata a layer only takes what a step may need."""
    runner = make(base_config, coded_later=8192)
    layer = runner.layers[runner.names[0]]
    query = torch.zeros(4, 4, 64)
    layer.impl.forward(layer, query, query, query, layer.kv_cache, None, torch.empty_like(query))
    assert layer.impl._later.shape == (2, 4096, 2, 64)  # no step is larger


def test_states_are_not_waited_beside(base_config):
    """They are copied between blocks before a step's builders are called."""
    runner = make(base_config, coded_later=300, block_tokens=128, beside_states=2)
    assert runner.codes._later.most_tokens == 0
