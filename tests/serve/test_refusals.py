"""Every refusal names its reason and its remedy."""

import dataclasses
import types

import pytest
import torch

from vllm_lexico.serve import refusals, setup
from vllm_lexico.serve.allowed_connectors import group_refusals


def an_engine(**changes):
    """A configuration that LEXICO accepts, with changes like `cache.cache_dtype="fp8"`."""
    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(
            use_mla=False,
            is_hybrid=False,
            is_encoder_decoder=False,
            is_mm_prefix_lm=False,
            dtype=torch.bfloat16,
            max_model_len=4096,
            hf_text_config=types.SimpleNamespace(),
            get_head_size=lambda: 128,
            get_sliding_window=lambda: None,
        ),
        attention_config=types.SimpleNamespace(backend=types.SimpleNamespace(name="LEXICO"), backend_per_kind={}),
        cache_config=types.SimpleNamespace(
            cache_dtype="auto", block_size=128, user_specified_block_size=False, sliding_window=None
        ),
        parallel_config=types.SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, use_ubatching=False
        ),
        scheduler_config=types.SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        kv_transfer_config=None,
        speculative_config=None,
        use_v2_model_runner=False,
        additional_config={},
    )
    for path, value in changes.items():
        *owners, name = path.split("__")
        owner = config
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return config


def connector(name, module=None, policy="fail", **extra):
    return types.SimpleNamespace(
        kv_connector=name,
        kv_connector_module_path=module,
        kv_load_failure_policy=policy,
        kv_connector_extra_config=extra,
    )


def drafts(method="eagle3", backend=None, **changes):
    """vLLM's `SpeculativeConfig` as far as refusals read it."""
    settings = {
        "method": method,
        "attention_backend": None if backend is None else types.SimpleNamespace(name=backend),
        "draft_model_config": types.SimpleNamespace(is_hybrid=False),
        "enable_adaptive_verification": False,
        "use_gemma4_mtp": lambda: False,
        "use_multi_module_mtp": lambda: False,
    }
    return types.SimpleNamespace(**settings | changes)


MIXED = ["sliding_attention", "full_attention"]
A_CONNECTOR = types.SimpleNamespace(kv_connector="LMCacheConnectorV1")
ENGINES = [
    ({"cache_config__cache_dtype": "fp8"}, ["a KV cache in fp8", "start with --kv-cache-dtype bfloat16"]),
    (
        {"cache_config__cache_dtype": "fp8", "model_config__dtype": torch.float16},
        ["a KV cache in fp8", "start with --kv-cache-dtype float16"],
    ),
    ({"cache_config__cache_dtype": "float16"}, ["a KV cache in float16", "start with --kv-cache-dtype bfloat16"]),
    (
        {"cache_config__cache_dtype": "fp8", "model_config__dtype": torch.float32},
        ["a KV cache in fp8", "start with --dtype bfloat16 --kv-cache-dtype bfloat16"],
    ),
    ({"model_config__use_mla": True}, ["multi-head latent attention", "another --attention-backend"]),
    (
        {
            "model_config__is_hybrid": True,
            "cache_config__block_size": 64,
            "cache_config__user_specified_block_size": True,
        },
        ["--block-size 64", "give 128, 256, 512, 1024, 2048 or 4096, or leave it out"],
    ),
    ({"model_config__is_encoder_decoder": True}, ["encoder", "only decoders"]),
    (
        {"model_config__is_mm_prefix_lm": True},
        ["images are seen in both directions", """start with --limit-mm-per-prompt '{"image": 0}'"""],
    ),
    (
        {"scheduler_config__disable_hybrid_kv_cache_manager": True},
        ["hybrid KV cache manager is off", "full-precision tokens", "without --disable-hybrid-kv-cache-manager"],
    ),
    (
        {"scheduler_config__disable_hybrid_kv_cache_manager": True, "kv_transfer_config": A_CONNECTOR},
        ["LMCacheConnectorV1 turns the hybrid KV cache manager off", "without --kv-transfer-config"],
    ),
    ({"kv_transfer_config": A_CONNECTOR}, ["LMCacheConnectorV1 is not supported", "without --kv-transfer-config"]),
    (
        {"kv_transfer_config": A_CONNECTOR, "cache_config__kv_offloading_size": 4.0},
        ["LMCacheConnectorV1 is not supported", "start without --kv-offloading-size"],
    ),
    (
        {
            "scheduler_config__disable_hybrid_kv_cache_manager": True,
            "kv_transfer_config": A_CONNECTOR,
            "cache_config__kv_offloading_size": 4.0,
        },
        ["turns the hybrid KV cache manager off", "start without --kv-offloading-size"],
    ),
    ({"kv_transfer_config": connector("SomeConnector", "some.module")}, ["SomeConnector is not supported", "Nixl"]),
    (
        {"kv_transfer_config": connector("OffloadingConnector", spec_name="TieringOffloadingSpec")},
        ["'spec_name' as 'TieringOffloadingSpec'", "leave it out", "cpu_bytes_to_use"],
    ),
    (
        {"kv_transfer_config": connector("SimpleCPUOffloadConnector", lazy_offload=True)},
        ["'lazy_offload' as True", "leave it out"],
    ),
    (
        {"kv_transfer_config": connector("NixlConnector", enforce_handshake_compat=False)},
        ["'enforce_handshake_compat' as False", "leave it out"],
    ),
    (
        {
            "kv_transfer_config": connector("OffloadingConnector"),
            "additional_config": {"lexico": {"prefix_hits": "same"}},
        },
        ["brings no window", 'set prefix_hits to "codes"', "without --kv-transfer-config"],
    ),
    (
        {
            "kv_transfer_config": connector("NixlConnector"),
            "additional_config": {"lexico": {"coded_later": 8192}},
        },
        ["leaves uncoded", "remove coded_later", "without --kv-transfer-config"],
    ),
    (
        {"kv_transfer_config": connector("NixlConnector"), "model_config__is_hybrid": True},
        ["models with states", "without --kv-transfer-config"],
    ),
    (
        {"kv_transfer_config": connector("NixlConnector", policy="recompute")},
        ["kv_load_failure_policy 'recompute'", "leave it at 'fail'"],
    ),
    ({"parallel_config__decode_context_parallel_size": 2}, ["decode context parallelism", "at 1"]),
    ({"parallel_config__prefill_context_parallel_size": 2}, ["prefill context parallelism", "at 1"]),
    ({"parallel_config__use_ubatching": True}, ["dual batch overlap", "--enable-dbo"]),
    ({"speculative_config": drafts("medusa")}, ["'medusa'", "use ngram", "eagle3", "or serve without drafts"]),
    (
        {"speculative_config": drafts(backend="LEXICO")},
        ["raw pages", "leave attention_backend out of --speculative-config"],
    ),
    ({"speculative_config": drafts("mtp", use_gemma4_mtp=lambda: True)}, ["reads that of the model", "ngram"]),
    ({"speculative_config": drafts("mtp", use_multi_module_mtp=lambda: True)}, ["several MTP modules", "start with 1"]),
    (
        {"speculative_config": drafts("draft_model", draft_model_config=types.SimpleNamespace(is_hybrid=True))},
        ["of the drafts keeps a state", "use drafts that keep tokens alone"],
    ),
    (
        {
            "model_config__hf_text_config": types.SimpleNamespace(layer_types=MIXED),
            "speculative_config": drafts("draft_model"),
        },
        ["a draft model beside layers with windows", "another group's block table", "use ngram"],
    ),
    ({"speculative_config": drafts(enable_adaptive_verification=True)}, ["adaptive verification", "at false"]),
    (
        {"speculative_config": drafts("draft_model", draft_model_config=types.SimpleNamespace(is_hybrid=True))},
        ["keeps a state", "drafts that keep tokens alone"],
    ),
    (
        {"cache_config__block_size": 48, "cache_config__user_specified_block_size": True},
        ["--block-size 48", "give 64, 128 or 256, or leave it out for 128"],
    ),
]
SELECTED = {"head_size": 128, "kv_cache_dtype": "auto", "attn_type": "decoder", "dtype": torch.bfloat16}
MODELS = [
    ({"model_config__get_head_size": lambda: 72}, ["head size 72", "only 64, 80, 96", "another --attention-backend"]),
    ({"cache_config__sliding_window": 4095}, ["window of 4095 tokens", "may have 4096", "--disable-sliding-window"]),
    (
        {
            "model_config__hf_text_config": types.SimpleNamespace(layer_types=["sliding_attention"] * 2),
            "model_config__get_sliding_window": lambda: 512,
        },
        ["window of 512 tokens", "--disable-sliding-window, which limits sequences", "another --attention-backend"],
    ),
    (
        {
            "model_config__hf_text_config": types.SimpleNamespace(
                layer_types=["sliding_attention", "full_attention"], sliding_window=None
            )
        },
        ["sliding windows are switched off", "sliding_window is None", "without --disable-sliding-window and without"],
    ),
]
LAYERS_BY_SELECTOR = [
    ({"kv_cache_dtype": "turboquant_3bit_nc"}, ["KV cache in turboquant_3bit_nc", "--kv-cache-dtype bfloat16"]),
    ({"block_size": 96}, ["--block-size 96", "give 64, 128 or 256"]),
    ({"use_mla": True, "head_size": 576}, ["MLA", "another --attention-backend"]),
    ({"head_size": 72}, ["head size 72", "only 64, 80, 96", "another --attention-backend"]),
    ({"attn_type": "encoder_only"}, ["encoder", "only decoders"]),
    ({"use_dcp": True}, ["decode context parallelism", "--decode-context-parallel-size"]),
]
LAYERS_BY_ARGUMENTS = [
    ({"alibi_slopes": [0.5]}, ["ALiBi", "another --attention-backend"]),
    ({"sliding_window": 4095}, ["window of 4095 tokens", "--disable-sliding-window", "another --attention-backend"]),
    ({"attn_type": "encoder_decoder"}, ["encoder"]),
    ({"kv_sharing_target": "model.layers.3.attn"}, ["share the cache", "model.layers.3.attn"]),
]


def check(reasons, words):
    (reason,) = reasons
    assert all(word in reason for word in words), reason
    with pytest.raises(ValueError, match="LEXICO cannot serve this") as error:
        refusals.refuse(reasons)
    assert reason in str(error.value)


def test_what_is_supported_is_not_refused():
    assert refusals.engine_refusals(an_engine()) == refusals.model_refusals(an_engine()) == []
    assert refusals.selector_refusals(SELECTED) == refusals.selector_refusals(SELECTED | {"block_size": 64}) == []
    assert refusals.layer_refusals(max_model_len=4096) == []
    refusals.refuse([])


@pytest.mark.parametrize("window", [4096, 262144])  # of Mistral-7B at 4,096 tokens, of Phi-4-mini
def test_a_window_that_no_sequence_outgrows_is_none(window):
    assert refusals.layer_refusals(max_model_len=4096, sliding_window=window) == []
    assert refusals.selector_refusals(SELECTED | {"has_sliding_window": True}) == []
    assert refusals.model_refusals(an_engine(cache_config__sliding_window=window)) == []


def test_windows_of_other_layers_are_no_reason():
    kinds = types.SimpleNamespace(layer_types=["sliding_attention", "full_attention"])
    changes = {"model_config__hf_text_config": kinds, "model_config__get_sliding_window": lambda: 512}
    assert refusals.model_refusals(an_engine(**changes)) == []


def test_values_of_another_size():
    assert refusals.value_size_refusals(128, 128, "layers.3.attn") == []
    check(refusals.value_size_refusals(192, 128, "layers.3.attn"), ["layers.3.attn", "192", "128", "equal sizes"])


def test_windows_that_another_backend_serves():
    changes = {"cache_config__sliding_window": 512, "attention_config__backend_per_kind": {"sliding_window": None}}
    assert refusals.model_refusals(an_engine(**changes)) == []


@pytest.mark.parametrize("changes, words", MODELS)
def test_model(changes, words):
    check(refusals.model_refusals(an_engine(**changes)), words)


@pytest.mark.parametrize("changes, words", ENGINES)
def test_engine(changes, words):
    check(refusals.engine_refusals(an_engine(**changes)), words)


@pytest.mark.parametrize("changes, words", LAYERS_BY_SELECTOR)
def test_layer_as_the_selector_sees_it(changes, words):
    check(refusals.selector_refusals(SELECTED | changes), words)


@pytest.mark.parametrize("changes, words", LAYERS_BY_ARGUMENTS)
def test_layer_as_its_implementation_sees_it(changes, words):
    check(refusals.layer_refusals(max_model_len=4096, **changes), words)


@pytest.mark.parametrize("method", ["ngram", "suffix", "eagle", "eagle3", "mtp", "draft_model", "dflash"])
def test_drafts_are_welcome(method):
    """A draft model beside windows too, by the runner that gives it the block table of its own group."""
    mixed = {"model_config__hf_text_config": types.SimpleNamespace(layer_types=MIXED), "use_v2_model_runner": True}
    assert refusals.engine_refusals(an_engine(speculative_config=drafts(method), **mixed)) == []
    assert refusals.engine_refusals(an_engine(speculative_config=drafts(method))) == []
    assert refusals.engine_refusals(an_engine(speculative_config=drafts(method, "FLASH_ATTN"))) == []


def test_vllm_names_what_the_selector_hands_over():
    """The names that `selector_refusals` looks for are those of vLLM's selector."""
    selector = pytest.importorskip("vllm.v1.attention.selector")
    names = set(selector.AttentionSelectorConfig._fields)
    assert {
        "head_size",
        "dtype",
        "kv_cache_dtype",
        "block_size",
        "use_mla",
        "has_sink",
        "attn_type",
        "use_dcp",
    } <= names
    import vllm.config as config

    for owner, name in [
        (config.SchedulerConfig, "disable_hybrid_kv_cache_manager"),
        (config.ParallelConfig, "decode_context_parallel_size"),
        (config.ParallelConfig, "prefill_context_parallel_size"),
        (config.CacheConfig, "user_specified_block_size"),
        (config.CacheConfig, "sliding_window"),
        (config.AttentionConfig, "backend_per_kind"),
        (config.SpeculativeConfig, "method"),
        (config.SpeculativeConfig, "attention_backend"),
        (config.SpeculativeConfig, "enable_adaptive_verification"),
        (config.KVTransferConfig, "kv_connector"),
        (config.KVTransferConfig, "kv_connector_module_path"),
        (config.KVTransferConfig, "kv_connector_extra_config"),
        (config.KVTransferConfig, "kv_load_failure_policy"),
    ]:
        assert name in {field.name for field in dataclasses.fields(owner)}, name


def of_kind(name):
    return type(name, (), {})


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("ChunkedLocalAttention", "local attention within chunks (as in Llama 4)"),
        ("ChunkedLocalAttention_64_LexicoBackend", "local attention within chunks (as in Llama 4)"),
        ("StaticSinkAttention", "learned tokens before the first"),
        ("StaticSink_LexicoBackend", "learned tokens before the first"),
        ("PrefillPrefixLMAttention", "in both directions over a prompt"),
        ("EncoderOnlyAttention_LexicoBackend", "in both directions"),
        ("CrossAttention", "an encoder's output"),
        ("RSWAAttention", "reference sliding-window"),
        ("WhisperCausalAttentionWithBlockPooling", "pooled blocks"),
        ("AttentionOfAModelToCome", "only plain Attention is"),
    ],
)
def test_layer_by_its_class(kind, words):
    served = of_kind("Attention")
    assert refusals.attention_class_refusals(served, served) == []
    check(refusals.attention_class_refusals(of_kind(kind), served), [f"is a {kind}", words, "another --attention"])
    (named,) = refusals.attention_class_refusals(of_kind("Attention"), served, "model.layers.0.attn")
    assert "of layer model.layers.0.attn is a Attention" in named  # a namesake is not it


@pytest.mark.parametrize(
    ("codec", "device", "refused"), [("paper", "cuda", True), ("paper", "cpu", False), ("exact", "cuda", False)]
)
def test_a_codec_without_kernels_is_for_a_cpu(codec, device, refused, monkeypatch):
    monkeypatch.setattr(setup, "current_platform", types.SimpleNamespace(device_type=device))
    monkeypatch.setattr(setup, "_checked_dictionary", lambda *_: (None, ()))
    monkeypatch.setattr(setup.ModelFingerprint, "of", lambda *_: None)
    engine = types.SimpleNamespace(
        additional_config={"lexico": {"codec": codec}},
        model_config=types.SimpleNamespace(
            hf_text_config=None, model="some/model", hf_overrides={}, max_model_len=4096, is_hybrid=False
        ),
        parallel_config=types.SimpleNamespace(pipeline_parallel_size=1),
        num_speculative_tokens=0,
        max_concurrent_batches=1,
        speculative_config=None,
    )
    if refused:
        with pytest.raises(ValueError, match=r"codec 'paper' has no kernels for a GPU.*choose codec 'packed16'"):
            setup.LexicoSetup.of(engine)
    else:
        assert setup.LexicoSetup.of(engine).config.codec == codec


@pytest.mark.parametrize("mask", [(False,), (torch.tensor([True, True]),), (True, True)])
def test_a_mask_that_is_not_causal_is_refused(mask):
    check(refusals.mask_refusals(*mask), ["attention in both directions", "another --attention-backend"])
    assert refusals.mask_refusals(True) == []


def test_connectors_and_settings_that_are_served():
    for given in (
        connector("OffloadingConnector", cpu_bytes_to_use=1 << 30, spec_name="CPUOffloadingSpec"),
        connector("SimpleCPUOffloadConnector", cpu_bytes_to_use=1 << 30, lazy_offload=False),
        connector("NixlConnector", backends=["UCX"], enforce_handshake_compat=True),
    ):
        assert refusals.engine_refusals(an_engine(kv_transfer_config=given)) == []
    assert group_refusals("NixlConnector", 1, 1, 2) == []
    check(group_refusals("NixlConnector", 1, 1, 3), ["not supported where some layers are not coded", "of 3 cache"])
