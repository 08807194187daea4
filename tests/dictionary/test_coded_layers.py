"""Which layers are coded, over transformers' own configurations and over what older or foreign ones say."""

import subprocess
import sys
from types import SimpleNamespace as Config

import pytest
import transformers

from vllm_lexico.dictionary.coded_layers import coded_layers, state_layers

SHORT = {"num_hidden_layers": 12}
EVERY = tuple(range(12))

# Class of transformers, what is set in it, the layers that are coded.
FAMILIES = [
    ("LlamaConfig", SHORT, EVERY),
    ("Qwen3MoeConfig", SHORT, EVERY),
    ("GPT2Config", SHORT, EVERY),
    ("FalconConfig", SHORT, EVERY),
    ("SmolLM3Config", SHORT, EVERY),  # its layers without rotary embedding are like the others
    ("Step3p7TextConfig", SHORT, EVERY),
    ("Qwen3VLTextConfig", SHORT, EVERY),
    ("Qwen2_5_VLTextConfig", SHORT, EVERY),
    ("MistralConfig", SHORT | {"sliding_window": 4096}, EVERY),  # all of one kind, with a window
    ("MinistralConfig", SHORT, EVERY),
    ("Phi3Config", SHORT | {"sliding_window": 262_144}, EVERY),
    ("Qwen2Config", SHORT | {"use_sliding_window": False, "max_window_layers": 8, "sliding_window": 64}, EVERY),
    ("Qwen2Config", SHORT | {"use_sliding_window": True, "max_window_layers": 8, "sliding_window": 64}, range(8)),
    ("Qwen2Config", SHORT | {"use_sliding_window": True, "max_window_layers": 0, "sliding_window": 64}, EVERY),
    ("Gemma2Config", SHORT, (1, 3, 5, 7, 9, 11)),
    ("Gemma3TextConfig", SHORT, (5, 11)),
    (
        "Gemma3TextConfig",
        SHORT | {"sliding_window": 1 << 20},
        (5, 11),
    ),  # the others never bind, and are left all the same
    ("Gemma3nTextConfig", {}, (4, 9, 14, 19)),  # 24, 29 and 34 read the keys and values of others
    ("Gemma4TextConfig", {}, (5, 11, 17, 23, 29)),
    ("GptOssConfig", SHORT, (1, 3, 5, 7, 9, 11)),
    ("Cohere2Config", SHORT, (3, 7, 11)),
    ("Olmo3Config", SHORT, (3, 7, 11)),
    ("Exaone4Config", SHORT, (3, 7, 11)),
    ("Exaone4Config", SHORT | {"layer_types": ["full_attention"] * 12}, EVERY),
    ("MiMoV2FlashConfig", {}, (0, 5, 11, 17, 23, 29, 35, 41, 47)),
    ("Llama4TextConfig", SHORT, (3, 7, 11)),
    ("Llama4TextConfig", SHORT | {"no_rope_layers": [0, 1, 0, 1] * 3}, (0, 2, 4, 6, 8, 10)),
    ("Llama4TextConfig", SHORT | {"attention_chunk_size": None}, EVERY),
    ("Qwen3NextConfig", SHORT, (3, 7, 11)),
    ("Qwen3_5TextConfig", SHORT, (3, 7, 11)),
    ("Qwen3_5MoeTextConfig", SHORT, (3, 7, 11)),
    ("OlmoHybridConfig", SHORT, (3, 7, 11)),
    ("NemotronHConfig", {"hybrid_override_pattern": "ME*-M*"}, (2, 5)),
    ("BambaConfig", SHORT | {"attn_layer_indices": [2, 9]}, (2, 9)),
    ("GraniteMoeHybridConfig", SHORT | {"layer_types": (["mamba"] * 5 + ["attention"]) * 2}, (5, 11)),
    ("JambaConfig", SHORT | {"attn_layer_period": 4, "attn_layer_offset": 1}, (1, 5, 9)),
    ("Lfm2Config", SHORT | {"full_attn_idxs": [2, 5, 8]}, (2, 5, 8)),
    ("Lfm2MoeConfig", SHORT | {"layer_types": (["conv"] * 3 + ["full_attention"]) * 3}, (3, 7, 11)),
    ("MiniMaxConfig", SHORT, (0, 2, 4, 6, 8, 10)),
    ("FalconH1Config", SHORT, EVERY),  # attention and Mamba in each
    ("Zamba2Config", SHORT | {"layers_block_type": (["mamba"] * 5 + ["hybrid"]) * 2}, (5, 11)),
]


@pytest.mark.parametrize(
    ("name", "settings", "coded"), FAMILIES, ids=[f"{row[0]}-{at}" for at, row in enumerate(FAMILIES)]
)
def test_layers_of_a_family(name, settings, coded):
    assert coded_layers(getattr(transformers, name)(**settings)) == tuple(coded)


@pytest.mark.parametrize(
    ("settings", "coded"),
    [
        ({"hybrid_override_pattern": "M-M*M-"}, (3,)),  # of older code: names are not written out
        ({"layers_block_type": ["mamba", "attention", "moe", "mlp", "mamba", "attention"]}, (1, 5)),
        ({"attn_type_list": [0, 0, 1, 0, 0, 1]}, (2, 5)),
        ({"hybrid_layer_pattern": [0, 1, 1, 1, 1, 0]}, (0, 5)),
        ({"full_attn_idxs": [1, 4]}, (1, 4)),
        ({"attn_layer_indices": [0]}, (0,)),
        ({"attn_layer_period": 3, "attn_layer_offset": 2}, (2, 5)),
        ({"full_attention_interval": 2}, (1, 3, 5)),
        ({"sliding_window": 8, "sliding_window_pattern": 3}, (2, 5)),
        ({"sliding_window": 8, "sliding_window_pattern": "LG"}, (1, 3, 5)),
        ({"sliding_window": None, "sliding_window_pattern": 3}, (0, 1, 2, 3, 4, 5)),
        ({"no_rope_layers": [1, 0, 1, 0, 1, 1]}, (0, 1, 2, 3, 4, 5)),  # without chunks: SmolLM3's
        ({"no_rope_layers": [1, 0, 1, 0, 1, 1], "attention_chunk_size": 8192}, (1, 3)),
        ({"layer_types": ["full_attention"] + ["sliding_attention"] * 7}, (0,)),  # two are of a draft
        ({"layer_types": ["sliding_attention", "linear_attention"] * 3}, (0, 2, 4)),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3, "num_kv_shared_layers": 2}, (1, 3)),
        ({}, (0, 1, 2, 3, 4, 5)),
    ],
    ids=str,
)
def test_layers_of_other_configurations(settings, coded):
    assert coded_layers(Config(model_type="own", num_hidden_layers=6, num_attention_heads=4, **settings)) == coded


@pytest.mark.parametrize(
    ("settings", "states"),
    [
        ({"hybrid_override_pattern": "M-M*ME"}, (0, 2, 4)),  # experts and plain layers keep nothing
        ({"layers_block_type": ["mamba", "hybrid"] * 3}, (0, 1, 2, 3, 4, 5)),  # Zamba2: a hybrid is coded too
        ({"layer_types": ["conv", "sliding_attention", "full_attention"] * 2}, (0, 3)),
        ({}, ()),
    ],
    ids=str,
)
def test_layers_that_keep_a_state(settings, states):
    assert state_layers(Config(model_type="own", num_hidden_layers=6, num_attention_heads=4, **settings)) == states


@pytest.mark.parametrize("name", ["MambaConfig", "Mamba2Config", "BambaConfig", "FalconMambaConfig"])
def test_a_model_without_attention_is_refused(name):
    config = getattr(transformers, name)()
    with pytest.raises(ValueError, match="has no attention layer whose cache grows with the context") as refused:
        coded_layers(config)
    assert config.model_type in str(refused.value)


def test_a_model_without_heads_is_refused():
    with pytest.raises(ValueError, match="model of type 'rwkv' has no attention layer"):
        coded_layers(Config(model_type="rwkv", num_hidden_layers=4))


def test_unknown_kinds_are_refused_by_name():
    config = Config(model_type="new", num_hidden_layers=2, layer_types=["full_attention", "indexed_attention"])
    with pytest.raises(ValueError, match="'indexed_attention'; allowed: attention, chunked_attention, "):
        coded_layers(config)
    with pytest.raises(ValueError, match="a layer of the model of type 'new' was given as 'X'"):
        coded_layers(Config(model_type="new", num_hidden_layers=2, hybrid_override_pattern="*X"))


def test_too_few_kinds_are_refused():
    with pytest.raises(ValueError, match="was given as 2; allowed: 4 or more, one per layer"):
        coded_layers(Config(model_type="new", num_hidden_layers=4, layer_types=["full_attention"] * 2))


def test_it_imports_neither_torch_nor_transformers():
    code = "import sys, vllm_lexico.dictionary.coded_layers; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
