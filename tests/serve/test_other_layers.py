"""Layers that are left to vLLM: the pages that they share with codes, and the blocks that make room for them."""

import dataclasses
import types

import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.core.kv_cache_utils import partial_hash_hits_enabled
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, MambaManager
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from vllm_lexico.compat import layers
from vllm_lexico.config import LexicoConfig
from vllm_lexico.serve import other_layers, state_blocks
from vllm_lexico.serve.setup import LexicoSetup
from vllm_lexico.serve.tail_pages import LexicoTailManager, tail_spec

HEADS = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}  # 512 bytes a token
PAGE = 16 * 512


def a_backend(*blocks):
    return types.SimpleNamespace(get_supported_kernel_block_sizes=lambda spec: blocks, get_name=lambda: "SOME_ATTN")


@pytest.mark.parametrize(
    "spec",
    [
        SlidingWindowSpec(**HEADS, block_size=128, sliding_window=100),
        ChunkedLocalAttentionSpec(**HEADS, block_size=128, attention_chunk_size=64),
        FullAttentionSpec(**HEADS, block_size=64),
    ],
)
@pytest.mark.parametrize(("page", "tokens", "padded"), [(PAGE, 16, None), (3 * PAGE, 32, 3 * PAGE), (7000, 8, 7000)])
def test_pages_have_the_bytes_of_code_pages(spec, page, tokens, padded):
    fitted = other_layers.fitted(spec, a_backend(MultipleOf(8)), page, "layers.0.attn")
    assert (type(fitted), fitted.block_size, fitted.page_size_padded) == (type(spec), tokens, padded)
    assert fitted.page_size_bytes == page
    assert getattr(fitted, "sliding_window", None) == getattr(spec, "sliding_window", None)


def test_a_backend_reads_its_own_blocks_only():
    spec = SlidingWindowSpec(**HEADS, block_size=128, sliding_window=100)
    assert other_layers.fitted(spec, a_backend(16, 64), 5 * PAGE, "layers.0.attn").block_size == 64
    with pytest.raises(ValueError, match=r"16 raw tokens of layer layers\.0\.attn, too few for SOME_ATTN; raise"):
        other_layers.fitted(spec, a_backend(MultipleOf(32)), PAGE, "layers.0.attn")


def test_what_keeps_something_else_than_tokens_is_refused():
    state = MambaSpec(shapes=((4, 4),), dtypes=(torch.float32,), block_size=64)
    with pytest.raises(ValueError, match=r"layer layers\.0\.mixer keeps a MambaSpec, which is not supported"):
        other_layers.fitted(state, a_backend(16), PAGE, "layers.0.mixer")


def a_model(dtype=torch.bfloat16, head_size=128):
    return types.SimpleNamespace(get_head_size=lambda: head_size, dtype=dtype)


def a_setup(sparsity):
    config = LexicoConfig.from_additional_config({"lexico": {"sparsity": sparsity}})
    return LexicoSetup(config, None, num_draft_tokens=0, concurrent_batches=1)


@pytest.mark.parametrize(
    ("on_cpu", "sparsity", "tokens"), [(False, 15, 128), (False, 7, 256), (True, 15, 256), (True, 7, 512)]
)
def test_blocks_of_codes_have_room_for_raw_ones(monkeypatch, on_cpu, sparsity, tokens):
    """FlashAttention reads blocks of 16 tokens, CPU_ATTN of 32."""
    monkeypatch.setattr(other_layers, "current_platform", types.SimpleNamespace(is_cpu=lambda: on_cpu))
    setup = a_setup(sparsity)
    assert other_layers.fitting_block(setup, a_model(), None) == tokens
    assert setup.layout(128, 1, tokens, torch.bfloat16).tail_tokens == (32 if on_cpu else 16)
    with pytest.raises(
        ValueError, match=r"blocks of 64 tokens, coded in .*raise the sparsity, or leave --block-size out"
    ):
        other_layers.fitting_block(setup, a_model(), 64)


def test_too_few_atoms_for_other_layers(monkeypatch):
    monkeypatch.setattr(other_layers, "current_platform", types.SimpleNamespace(is_cpu=lambda: False))
    with pytest.raises(ValueError, match=r"128, 256, 512 or 1024 tokens, coded in 0\.78%.*raise the sparsity$"):
        other_layers.fitting_block(a_setup(1), a_model(head_size=256), None)


def test_a_spec_is_changed_once():
    layer = types.SimpleNamespace(get_kv_cache_spec=lambda config: [config])
    for _ in range(2):
        layers.change_cache_spec(layer, lambda spec, config: [*spec, "changed", config])
    assert layer.get_kv_cache_spec("asked") == ["asked", "changed", "asked"]


def a_hybrid(state_layers=36, coded=12, step_tokens=8192, mode="align", scheduled=None, requests=16, drafts=0):
    """An engine with the shape of Qwen3-Next: heads of 256, 2 KV heads."""
    kinds = ["linear_attention"] * state_layers + ["full_attention"] * coded
    text = types.SimpleNamespace(layer_types=kinds, num_hidden_layers=len(kinds), model_type="qwen3_next")
    model = types.SimpleNamespace(
        hf_text_config=text,
        get_head_size=lambda: 256,
        get_num_kv_heads=lambda parallel: 2,
        dtype=torch.bfloat16,
        max_model_len=131072,
    )
    return types.SimpleNamespace(
        model_config=model,
        parallel_config=types.SimpleNamespace(pipeline_parallel_size=1),
        cache_config=types.SimpleNamespace(mamba_cache_mode=mode),
        scheduler_config=types.SimpleNamespace(
            max_num_batched_tokens=step_tokens, max_num_scheduled_tokens=scheduled, max_num_seqs=requests
        ),
        max_in_flight_tokens=4096,
        speculative_config=None,
        num_speculative_tokens=drafts,
    )


def test_blocks_beside_states_are_about_as_large_as_a_state():
    state = 2_146_304  # bytes
    setup = dataclasses.replace(a_setup(31), beside_states=12)
    tokens = other_layers.block_beside_states(setup, a_hybrid(), state, None)
    block = 12 * setup.layout(256, 2, tokens, torch.bfloat16).page_bytes
    assert tokens in (512, 1024) and state / 2 <= block <= 2 * state
    assert other_layers.block_beside_states(setup, a_hybrid(), state, 2048) == 2048
    with pytest.raises(ValueError, match=f"--block-size 128 is too small beside .* leave it out for {tokens}"):
        other_layers.block_beside_states(setup, a_hybrid(), state, 128)
    assert other_layers.block_beside_states(setup, a_hybrid(), 50_000, None) == 128


def test_prompts_go_on_while_others_decode():
    """vLLM has prefill end with a block: a block as large as a step waits until nothing decodes."""
    state = 2_146_304
    setup = dataclasses.replace(a_setup(31), beside_states=12)
    chosen = {
        step: other_layers.block_beside_states(setup, a_hybrid(step_tokens=step), state, None)
        for step in (512, 1023, 1024, 2047, 2048, 8192)
    }
    assert chosen == {512: 1024, 1023: 1024, 1024: 512, 2047: 512, 2048: 1024, 8192: 1024}
    assert other_layers.block_beside_states(setup, a_hybrid(step_tokens=1024, mode="none"), state, None) == 1024
    for given, step in ((1024, 1024), (1024, 1039), (2048, 2048)):
        with pytest.raises(
            ValueError, match=f"--block-size {given} leaves no room .* steps of {step} tokens.* {2 * given}"
        ):
            other_layers.block_beside_states(setup, a_hybrid(step_tokens=step), state, given)
    for given, step, more in (
        (1024, 1040, {}),
        (1024, 1023, {}),
        (2048, 512, {}),
        (1024, 2048, {"requests": 1024, "drafts": 1}),  # half a step is left, however much may decode
    ):
        assert other_layers.block_beside_states(setup, a_hybrid(step_tokens=step, **more), state, given) == given
    with pytest.raises(ValueError, match="--block-size 1024 leaves no room"):
        other_layers.block_beside_states(setup, a_hybrid(step_tokens=1500, requests=160, drafts=2), state, 1024)
    assert other_layers.block_beside_states(setup, a_hybrid(scheduled=1024), state, None) == 512
    with pytest.raises(ValueError, match=r"steps of 1024 tokens.*--max-num-scheduled-tokens to 2048"):
        other_layers.block_beside_states(setup, a_hybrid(scheduled=1024), state, 1024)


def hits(block_tokens, lengths):
    """Tokens of prompts that are asked again; the last token is computed anew."""
    return [(length - 1) // block_tokens * block_tokens for length in lengths]


@pytest.mark.parametrize(
    ("tokens", "plain", "chosen"),
    [
        ({256: 180, 512: 115, 1024: 100, 2048: 102}, 544, 512),  # Qwen3-Next at a sparsity of 15
        ({256: 290, 512: 163, 1024: 100, 2048: 135}, 528, 1024),  # Granite 4.0 H Small: smaller ones cost too much
        ({512: 267, 1024: 155, 2048: 100, 4096: 107}, 2096, 2048),  # Nemotron 3 Nano
        ({128: 104, 256: 100}, 1568, 128),
        ({128: 100, 256: 101}, 16, 128),  # LFM2: no block is as small as vLLM's
    ],
)
def test_blocks_are_no_larger_than_vllms_where_that_costs_little(tokens, plain, chosen):
    counted = {size: state_blocks.StateBlocks(1, cost, 0, 0) for size, cost in tokens.items()}
    assert state_blocks.block_tokens(counted, plain) == chosen
    if chosen <= plain:  # then hits are as long in the mean, though not at each length
        lengths = range(1, 131073)
        assert sum(hits(chosen, lengths)) >= sum(hits(plain, lengths))
    else:
        assert all(cost > state_blocks.DEARER * 100 for size, cost in tokens.items() if size <= plain)


def test_a_page_without_lexico_is_as_large_as_a_state():
    """As vLLM 0.33 said on an H200: 544 tokens of Qwen3-Next, 2,096 of Nemotron 3 Nano."""
    assert state_blocks.plain_block_tokens(1_097_728, 2048) == 544
    assert state_blocks.plain_block_tokens(2_134_016, 1024) == 2096


@pytest.mark.parametrize(("asked", "unit"), [(None, 8), (16, 8), (8, 8), (4, 4)])
def test_hits_end_at_whole_blocks_whatever_unit_is_asked_for(asked, unit):
    cache = types.SimpleNamespace(prefix_match_unit=asked, mamba_block_size=None)
    layout = a_setup(15).layout(128, 2, 128, torch.bfloat16)
    other_layers._hit_whole_blocks(cache, 128, layout)
    assert (layout.tail_tokens, cache.mamba_block_size, cache.prefix_match_unit) == (16, 128, unit)
    state = MambaSpec(shapes=((4, 4),), dtypes=(torch.float32,), block_size=128, mamba_cache_mode="align")
    codes = FullAttentionSpec(**HEADS, block_size=128)
    groups = [KVCacheGroupSpec([], spec) for spec in (state, codes, tail_spec(a_setup(15), layout, torch.bfloat16))]
    managers = [MambaManager, FullAttentionManager, LexicoTailManager]
    assert not partial_hash_hits_enabled(groups, cache.prefix_match_unit, 1, managers)
    assert partial_hash_hits_enabled(groups, layout.tail_tokens, 1, managers)


def test_a_state_needs_no_padding_and_is_kept_where_blocks_of_codes_end(monkeypatch):
    state = MambaSpec(
        shapes=((4, 4),), dtypes=(torch.float32,), block_size=384, page_size_padded=4096, mamba_cache_mode="align"
    )
    layout = types.SimpleNamespace(block_tokens=512, page_bytes=PAGE)
    tail = types.SimpleNamespace(layout=lambda config: layout)
    shared = other_layers._shared("layers.0.mixer", None, tail, state, None)
    assert (shared.block_size, shared.page_size_padded, shared.page_size_bytes) == (512, None, 64)
    inside = dataclasses.replace(state, num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=1)
    for on_cpu in (False, True):  # whose kernels keep no state inside of a chunk
        monkeypatch.setattr(
            other_layers, "current_platform", types.SimpleNamespace(is_cpu=lambda on_cpu=on_cpu: on_cpu)
        )
        kept = other_layers._shared("layers.0.mixer", None, tail, inside, None)
        assert (kept.num_prefill_checkpoint_blocks, kept.block_size) == (int(not on_cpu), 512)
    lasting = dataclasses.replace(state, mamba_cache_mode="none", block_size=4096)
    assert other_layers._shared("layers.0.mixer", None, tail, lasting, None).block_size == 4096
    assert other_layers._shared("layers.1.attn", None, tail, None, None) is None
