"""Keys are turned as vLLM turns them, by its own code: whatever the text's length and however the angles are scaled."""

import pytest
import torch
import transformers

from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.train.rotary import settle_rotary

HEAD, LONGEST, ORIGINAL = 16, 256, 64
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3] * 2, "long_factor": [2.0, 3.0, 5.0, 7.0] * 2,
            "original_max_position_embeddings": ORIGINAL}  # fmt: skip

# Kind -> rotary parameters, the longest sequence that is served.
KINDS = {
    "default": ({"rope_type": "default"}, None),
    "linear": ({"rope_type": "linear", "factor": 4.0}, None),
    "llama3": ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": ORIGINAL}, None),
    "yarn": ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}, None),
    "long": (LONGROPE, None),
    "long-served-long": (LONGROPE, ORIGINAL + 1),
    "long-served-short": (LONGROPE, ORIGINAL),
    "long-mscale": (LONGROPE | {"long_mscale": 1.5, "short_mscale": 1.25}, None),
    "short-mscale": (LONGROPE | {"long_mscale": 1.5, "short_mscale": 1.25}, ORIGINAL),
    "dynamic": ({"rope_type": "dynamic", "factor": 3.0}, None),
    "dynamic-trained": ({"rope_type": "dynamic", "factor": 3.0, "max_trained_positions": ORIGINAL}, None),
}  # fmt: skip


def turned_by_vllm(keys, parameters, max_model_len, monkeypatch):
    """keys [T, D] -> turned, by the rotary embedding that vLLM makes of these parameters."""
    from types import SimpleNamespace

    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import rotary_embedding
    from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope as longrope

    served = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len or LONGEST))
    monkeypatch.setattr(longrope, "get_current_vllm_config", lambda: served)
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    with set_current_vllm_config(VllmConfig()):
        rope = rotary_embedding.get_rope(HEAD, LONGEST, rope_parameters=dict(parameters), dtype=torch.float32)
        native = getattr(rope, "forward_native", rope.forward)
        return native(torch.arange(len(keys)), keys.clone(), keys.clone())[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [20, 250])
def test_keys_are_turned_as_vllm_turns_them(kind, tokens, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

    parameters, max_model_len = KINDS[kind]
    parameters = parameters | {"rope_theta": 10000.0}
    config = transformers.LlamaConfig(
        hidden_size=4 * HEAD, num_attention_heads=4, max_position_embeddings=LONGEST, rope_parameters=dict(parameters)
    )
    model = torch.nn.Module()
    model.rope = LlamaRotaryEmbedding(config)
    settle_rotary(model, max_model_len)
    tokens = min(tokens, max_model_len or tokens)
    keys = torch.randn(tokens, HEAD, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # a text before it changes nothing
        cos, sin = model.rope(keys, torch.arange(tokens)[None])
    got = keys * cos[0] + rotate_half(keys) * sin[0]
    torch.testing.assert_close(got, turned_by_vllm(keys, parameters, max_model_len, monkeypatch), atol=2e-4, rtol=2e-4)
    model.rope(keys, torch.arange(LONGEST)[None])  # nor does a long one
    again = model.rope(keys, torch.arange(tokens)[None])
    assert torch.equal(again[0], cos) and torch.equal(again[1], sin)


def test_layers_that_turn_differently_are_settled_each(monkeypatch):
    """Nested by kind of layer, as Gemma 3's: full layers stretched, windowed ones not."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    stretched = LONGROPE | {"rope_theta": 1e6, "long_factor": [3.0] * 8}
    config = transformers.Gemma3TextConfig(
        num_hidden_layers=6, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=HEAD,
        max_position_embeddings=LONGEST,
        rope_parameters={"full_attention": dict(stretched),
                         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    )  # fmt: skip
    model = torch.nn.Module()
    model.rope = Gemma3RotaryEmbedding(config)
    windowed = model.rope.sliding_attention_inv_freq.clone()
    settle_rotary(model)
    cos, _ = model.rope(torch.zeros(1), torch.arange(20)[None], "full_attention")
    keys = torch.ones(20, HEAD)
    expected = turned_by_vllm(keys, stretched, None, monkeypatch)
    torch.testing.assert_close(cos[0, 0], expected[0], atol=1e-5, rtol=1e-5)  # position 0: the scaling alone
    frequencies = 1 / (3.0 * 1e6 ** (torch.arange(0, HEAD, 2) / HEAD))
    torch.testing.assert_close(model.rope.full_attention_inv_freq, frequencies)
    assert torch.equal(model.rope.sliding_attention_inv_freq, windowed)
    assert ModelFingerprint.of(config).layers == (5,)
