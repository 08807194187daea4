"""Fingerprints: of the layers that are coded, and of the rotary factors with which vLLM turns their keys."""

import json
from types import SimpleNamespace

import pytest
import transformers

from vllm_lexico.dictionary.fingerprint import ModelFingerprint

LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "rope_theta": 10000.0}
SHAPE = {"num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


def phi(**changes):
    settings = SHAPE | {"rope_parameters": dict(LONG), "max_position_embeddings": 131072} | changes
    return transformers.Phi3Config(original_max_position_embeddings=4096, **settings)


# As they are in the files of releases before this one: a change here makes every such file useless.
KEPT = {
    "LlamaConfig": '{"rope_theta": 10000.0, "rope_type": "default"}',
    "Qwen2Config": '{"rope_theta": 10000.0, "rope_type": "default"}',
    "Qwen3Config": '{"rope_theta": 10000.0, "rope_type": "default"}',
    "MistralConfig": '{"rope_theta": 10000.0, "rope_type": "default"}',
    "Glm4Config": '{"partial_rotary_factor": 0.5, "rope_theta": 10000.0, "rope_type": "default"}',
    "ApertusConfig": '{"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, '
    '"original_max_position_embeddings": 8192.0, "rope_theta": 12000000.0, "rope_type": "llama3"}',
}


@pytest.mark.parametrize("name", KEPT)
def test_what_earlier_files_say_still_fits(name):
    config = getattr(transformers, name)(**SHAPE)
    got = ModelFingerprint.of(config, 100)
    assert got == ModelFingerprint(config.model_type, 12, 2, getattr(config, "head_dim", None) or 16, 64, KEPT[name])
    assert list(got.to_json()) == ["model_type", "num_layers", "num_kv_heads", "head_dim", "hidden_size", "rope"]


@pytest.mark.parametrize("scheme", [{"quant_method": "awq", "bits": 4}, {"quant_method": "fp8"}, {"quant_method": "x"}])
def test_how_a_model_is_quantized_does_not_count(scheme):
    plain = ModelFingerprint.of(transformers.LlamaConfig(**SHAPE))
    assert ModelFingerprint.of(transformers.LlamaConfig(**SHAPE, quantization_config=scheme)) == plain


def test_the_rotary_embedding_is_that_of_the_coded_layers():
    gemma = ModelFingerprint.of(transformers.Gemma3TextConfig(**SHAPE, head_dim=32))
    assert gemma.layers == (5, 11) and gemma.head_dim == 32
    assert json.loads(gemma.rope) == {"rope_theta": 1e6, "rope_type": "default"}
    all_windowed = transformers.Gemma3TextConfig(**SHAPE, layer_types=["sliding_attention"] * 12)
    assert json.loads(ModelFingerprint.of(all_windowed).rope)["rope_theta"] == 1e4
    scaled = transformers.Gemma3TextConfig(**SHAPE, rope_scaling={"rope_type": "linear", "factor": 8.0})
    assert json.loads(ModelFingerprint.of(scaled).rope)["factor"] == 8


def test_sizes_are_those_of_the_coded_layers():
    config = transformers.Gemma4TextConfig(num_hidden_layers=6)
    got = ModelFingerprint.of(config)
    own = config.per_layer_config[5]
    assert got.layers == (5,) and (got.head_dim, got.num_kv_heads) == (own.head_dim, own.num_key_value_heads)
    assert got.head_dim != config.per_layer_config[0].head_dim


@pytest.mark.parametrize(
    ("max_model_len", "factors", "command"),
    [(None, "long", None), (131072, "long", None), (4097, "long", None), (4096, "short", 4096), (100, "short", 4096)],
)
def test_which_rotary_factors_vllm_takes(max_model_len, factors, command):
    got = ModelFingerprint.of(phi(), max_model_len)
    rope = json.loads(got.rope)
    assert rope["factors"] == factors and rope["original_max_position_embeddings"] == 4096
    assert got.short_context == command


def test_the_original_context_may_stand_beside_the_rotary_embedding():
    config = SimpleNamespace(model_type="own", **SHAPE, max_position_embeddings=8192, rope_parameters=dict(LONG),
                             original_max_position_embeddings=1024)  # fmt: skip
    assert ModelFingerprint.of(config, 1024).short_context == 1024
    assert json.loads(ModelFingerprint.of(config).rope)["factors"] == "long"


def test_other_factors_are_refused_with_the_command(make_dictionary):
    served = ModelFingerprint.of(phi(), 4096)
    made = make_dictionary(name="microsoft/phi", fingerprint=ModelFingerprint.of(phi(num_hidden_layers=2)))
    short = ModelFingerprint.of(phi(num_hidden_layers=2), 4096)
    words = (
        r"does not fit microsoft/phi: rotary factors: long in the dictionary, short in the model\. Name a dictionary "
        r"of this model, or make one: vllm-lexico train microsoft/phi --max-model-len 4096$"
    )
    with pytest.raises(ValueError, match=words):
        made.check(short, "microsoft/phi")
    assert "num_layers: 2 in the dictionary, 12 in the model" in made.info.fingerprint.differences(served)
    before = ModelFingerprint.of(phi(num_hidden_layers=2)).rope.replace('"factors": "long", ', "")
    old = ModelFingerprint("phi3", 2, 2, 16, 64, before)
    assert old.differences(short) == ["rotary factors: not named in the dictionary, short in the model"]


@pytest.mark.parametrize("rope", ["", "[]", "7", "{", "null", '{"factors": 7}'])
def test_a_rotary_embedding_of_any_text_is_compared(rope):
    given = ModelFingerprint("phi3", 2, 2, 16, 64, rope)
    assert given.short_context is None and given.differences(ModelFingerprint.of(phi(num_hidden_layers=2)))
