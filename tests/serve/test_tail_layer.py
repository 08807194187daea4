"""The shadow layer says the same of its pages however vLLM's configuration changes after they were planned."""

import types

import pytest
import torch

pytest.importorskip("vllm")
from vllm_lexico.config import LexicoConfig
from vllm_lexico.serve.coding_plan import PlanHandover
from vllm_lexico.serve.setup import LexicoSetup
from vllm_lexico.serve.tail_layer import LexicoTail


def test_pages_stay_as_planned_when_the_block_size_of_the_configuration_changes():
    """vLLM 0.33 puts the smallest group's block size, the tail's, into it: 32 at D = 64 and sparsity 15."""
    setup = LexicoSetup(LexicoConfig(), None, 0, 1)
    attention = types.SimpleNamespace(num_kv_heads=3, head_size=64, kv_cache_torch_dtype=torch.bfloat16)
    shadow = LexicoTail(attention, setup, PlanHandover())
    config = types.SimpleNamespace(cache_config=types.SimpleNamespace(block_size=128))
    planned = shadow.get_kv_cache_spec(config)
    assert planned.block_size == 32
    config.cache_config.block_size = planned.block_size
    assert shadow.get_kv_cache_spec(config) == planned
    assert shadow.block_tokens == 128
