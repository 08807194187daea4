"""How many requests of the longest length vLLM's manager of pages holds at once, beside what it counts at the start.

Of Gemma 3 27B's layers, 24 of 62. For each request vLLM counts the tokens of two steps in every layer with a window,
as if all requests read their prompts at the same time.
"""

import json

import pytest
import torch

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.request import Request

from vllm_lexico.check import memory
from vllm_lexico.check.model import read_shape
from vllm_lexico.config import LexicoConfig
from vllm_lexico.serve.setup import LexicoSetup
from vllm_lexico.serve.tail_pages import tail_spec

HEADS = {"num_kv_heads": 16, "head_size": 128, "dtype": torch.bfloat16}
LAYERS, WINDOWED, WINDOW, SPARSITY = 4, 20, 1024, 15  # layers that grow, layers with a window
LONGEST, CHUNK, ANSWER = 131_072, 2_048, 32
POOL_BYTES = int(17.5 * 2**30)


@pytest.fixture(scope="module")
def shape(import_benchmark, tmp_path_factory):
    """What `vllm-lexico check` reads of the configuration."""
    import_benchmark("families")
    from bench.family_shapes import GEMMA_3_27B

    folder = tmp_path_factory.mktemp("gemma")
    (folder / "config.json").write_text(json.dumps(GEMMA_3_27B))
    return read_shape("gemma", str(folder))


def groups_of(coded):
    """vLLM's groups, each of as many layers."""
    window = SlidingWindowSpec(block_size=16, sliding_window=WINDOW, **HEADS)
    specs = [window] * (WINDOWED // LAYERS)
    if coded:
        setup = LexicoSetup(LexicoConfig.from_additional_config({"lexico": {"sparsity": SPARSITY}}), None, 0, 2)
        layout = setup.layout(128, 16, 128, torch.bfloat16)
        codes = FullAttentionSpec(block_size=128, state_content_bytes=layout.cell_bytes, **HEADS)
        specs = [codes, tail_spec(setup, layout, torch.bfloat16), *specs]
    else:
        specs = [FullAttentionSpec(block_size=16, **HEADS), *specs]
    (page_bytes,) = {spec.page_size_bytes for spec in specs}
    names = [[f"{at}.{layer}" for layer in range(LAYERS)] for at in range(len(specs))]
    return [KVCacheGroupSpec(*pair) for pair in zip(names, specs, strict=True)], LAYERS * page_bytes


class Pool:
    """Requests that come one after another, read their prompts in chunks, and decode while the next ones do."""

    def __init__(self, coded):
        groups, self.block_bytes = groups_of(coded)
        self.num_blocks = POOL_BYTES // self.block_bytes
        self.manager = KVCacheManager(
            KVCacheConfig(self.num_blocks, [], groups, prefix_cache_retention_interval=0),
            max_model_len=LONGEST,
            scheduler_block_size=groups[0].kv_cache_spec.block_size,
            hash_block_size=16,
            max_in_flight_tokens=2 * CHUNK,
            enable_caching=False,
        )
        self.running = []
        while self._takes_another():
            pass
        held = self.num_blocks - 1 - self.manager.block_pool.get_num_free_blocks()
        self.request_bytes = held * self.block_bytes / len(self.running)

    def _takes_another(self):
        prompt = LONGEST - ANSWER
        request = Request(str(len(self.running)), [1] * prompt, SamplingParams(max_tokens=ANSWER), None)
        for first in range(0, prompt, CHUNK):
            for other in self.running:
                if other.num_computed_tokens < LONGEST - 1:
                    other.append_output_token_ids(1)
                    assert self._step(other, 1), "a request that decodes gets no page"
            if not self._step(request, min(CHUNK, prompt - first), first == 0):
                assert first == 0, "a request that was let in gets no page"
                return False
        self.running.append(request)
        return True

    def _step(self, request, tokens, is_new=False):
        self.manager.new_step_starts()
        taken = self.manager.allocate_slots(request, tokens, 0, None, full_sequence_must_fit=is_new)
        request.num_computed_tokens += tokens if taken is not None else 0
        return taken is not None


@pytest.fixture(scope="module")
def pools():
    return {coded: Pool(coded) for coded in (False, True)}


def plan_of(coded, shape, chunk):
    load = memory.Load(LONGEST, chunk)
    return memory.coded_plan(shape, SPARSITY, load) if coded else memory.plain_plan(shape, load)


@pytest.mark.parametrize("coded", [False, True])
def test_a_request_holds_what_the_bytes_say_without_the_tokens_of_a_step(shape, pools, coded):
    counted = plan_of(coded, shape, 0)
    assert pools[coded].block_bytes == counted.block_bytes
    assert pools[coded].request_bytes == pytest.approx(counted.request_bytes, rel=0.005)


def test_six_times_as_many_requests_are_held_where_vllm_counts_fewer_than_four(shape, pools):
    counted = {coded: plan_of(coded, shape, CHUNK).tokens(POOL_BYTES, LONGEST) / LONGEST for coded in (False, True)}
    held = {coded: len(pool.running) for coded, pool in pools.items()}
    assert counted[True] / counted[False] == pytest.approx(3.69, abs=0.01)
    assert held[True] >= 6 * held[False] and held[False] > counted[False] and held[True] > 1.8 * counted[True]
