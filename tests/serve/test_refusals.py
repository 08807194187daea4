"""Every refusal names its reason and its remedy."""

import dataclasses
import types

import pytest

from vllm_lexico.serve import refusals


def an_engine(**changes):
    """A configuration that LEXICO accepts, with changes like `cache.cache_dtype="fp8"`."""
    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(use_mla=False, is_hybrid=False, is_encoder_decoder=False),
        cache_config=types.SimpleNamespace(cache_dtype="auto", block_size=128, user_specified_block_size=False),
        parallel_config=types.SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        scheduler_config=types.SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        kv_transfer_config=None,
        speculative_config=None,
    )
    for path, value in changes.items():
        *owners, name = path.split("__")
        owner = config
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return config


A_CONNECTOR = types.SimpleNamespace(kv_connector="LMCacheConnectorV1")
ENGINES = [
    ({"cache_config__cache_dtype": "fp8"}, ["--kv-cache-dtype fp8", "leave it at auto"]),
    ({"model_config__use_mla": True}, ["multi-head latent attention", "another --attention-backend"]),
    ({"model_config__is_hybrid": True}, ["Mamba", "another --attention-backend"]),
    ({"model_config__is_encoder_decoder": True}, ["encoder", "only decoders"]),
    (
        {"scheduler_config__disable_hybrid_kv_cache_manager": True},
        ["hybrid KV cache manager is off", "full-precision tokens", "without --disable-hybrid-kv-cache-manager"],
    ),
    (
        {"scheduler_config__disable_hybrid_kv_cache_manager": True, "kv_transfer_config": A_CONNECTOR},
        ["LMCacheConnectorV1 turns the hybrid KV cache manager off", "without --kv-transfer-config"],
    ),
    ({"kv_transfer_config": A_CONNECTOR}, ["LMCacheConnectorV1 is not supported", "without --kv-transfer-config"]),
    ({"parallel_config__decode_context_parallel_size": 2}, ["decode context parallelism", "at 1"]),
    ({"parallel_config__prefill_context_parallel_size": 2}, ["prefill context parallelism", "at 1"]),
    ({"parallel_config__use_ubatching": True}, ["dual batch overlap", "--enable-dbo"]),
    ({"speculative_config": types.SimpleNamespace(method="eagle")}, ["'eagle'", "no dictionary", "ngram"]),
    (
        {"cache_config__block_size": 48, "cache_config__user_specified_block_size": True},
        ["--block-size 48", "64, 128, 256"],
    ),
]
SELECTED = {"head_size": 128, "kv_cache_dtype": "auto", "attn_type": "decoder"}
LAYERS_BY_SELECTOR = [
    ({"kv_cache_dtype": "turboquant_3bit_nc"}, ["--kv-cache-dtype turboquant_3bit_nc", "auto"]),
    ({"use_mla": True, "head_size": 576}, ["MLA", "another --attention-backend"]),
    ({"head_size": 96}, ["head size 96", "only 64 and 128", "another --attention-backend"]),
    ({"has_sliding_window": True}, ["sliding-window", "pages have another size", "another --attention-backend"]),
    ({"has_sink": True}, ["learned attention sinks", "gpt-oss"]),
    ({"attn_type": "encoder_only"}, ["encoder", "only decoders"]),
    ({"use_dcp": True}, ["decode context parallelism", "--decode-context-parallel-size"]),
]
LAYERS_BY_ARGUMENTS = [
    ({"alibi_slopes": [0.5]}, ["ALiBi", "another --attention-backend"]),
    ({"sliding_window": 4096}, ["sliding-window", "pages have another size", "another --attention-backend"]),
    ({"logits_soft_cap": 50.0}, ["soft cap", "50.0"]),
    ({"attn_type": "encoder_decoder"}, ["encoder"]),
    ({"kv_sharing_target": "model.layers.3.attn"}, ["share the cache", "model.layers.3.attn"]),
    ({"sinks": object()}, ["learned attention sinks"]),
]


def check(reasons, words):
    (reason,) = reasons
    assert all(word in reason for word in words), reason
    with pytest.raises(ValueError, match="LEXICO cannot serve this") as error:
        refusals.refuse(reasons)
    assert reason in str(error.value)


def test_what_is_supported_is_not_refused():
    assert refusals.engine_refusals(an_engine()) == []
    assert refusals.selector_refusals(SELECTED) == []
    assert refusals.layer_refusals() == []
    refusals.refuse([])


@pytest.mark.parametrize("changes, words", ENGINES)
def test_engine(changes, words):
    check(refusals.engine_refusals(an_engine(**changes)), words)


@pytest.mark.parametrize("changes, words", LAYERS_BY_SELECTOR)
def test_layer_as_the_selector_sees_it(changes, words):
    check(refusals.selector_refusals(SELECTED | changes), words)


@pytest.mark.parametrize("changes, words", LAYERS_BY_ARGUMENTS)
def test_layer_as_its_implementation_sees_it(changes, words):
    check(refusals.layer_refusals(**changes), words)


def test_ngram_drafts_are_welcome():
    assert refusals.engine_refusals(an_engine(speculative_config=types.SimpleNamespace(method="ngram"))) == []


def test_vllm_names_what_the_selector_hands_over():
    """The names that `selector_refusals` looks for are those of vLLM's selector."""
    selector = pytest.importorskip("vllm.v1.attention.selector")
    names = set(selector.AttentionSelectorConfig._fields)
    assert {"head_size", "kv_cache_dtype", "use_mla", "has_sink", "has_sliding_window", "attn_type", "use_dcp"} <= names
    import vllm.config as config

    for owner, name in [
        (config.SchedulerConfig, "disable_hybrid_kv_cache_manager"),
        (config.ParallelConfig, "decode_context_parallel_size"),
        (config.ParallelConfig, "prefill_context_parallel_size"),
        (config.CacheConfig, "user_specified_block_size"),
        (config.SpeculativeConfig, "method"),
        (config.KVTransferConfig, "kv_connector"),
    ]:
        assert name in {field.name for field in dataclasses.fields(owner)}, name
