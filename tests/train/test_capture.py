"""What training captures of a model: keys and values as the cache would hold them, and what is refused."""

import pytest
import torch

from vllm_lexico.train.capture import capture, load_model


def test_capture_takes_what_the_cache_would_hold(tiny_model):
    model = load_model(str(tiny_model), "cpu", "float32")
    ids = torch.randint(64, (2, 48), generator=torch.Generator().manual_seed(5))
    store = capture(model, ids, 32, [1], (2, 64), seed=0, batch=1)
    cache = model(ids, use_cache=True).past_key_values.layers[1]
    for kv, vectors in enumerate((cache.keys, cache.values)):  # 48 - 16 = 32: every later position, in some order
        expected = vectors[:, :, 16:].transpose(1, 2).reshape(2, 32, -1)
        got = store[0, kv].view(2, 32, -1)
        torch.testing.assert_close(got.sum(1), expected.sum(1), atol=1e-4, rtol=1e-4)
        assert torch.cdist(got, expected, compute_mode="donot_use_mm_for_euclid_dist").min(-1).values.max() < 1e-3


def test_capture_adds_up_the_queries_of_a_group(tiny_model):
    model = load_model(str(tiny_model), "cpu", "float32")
    ids = torch.randint(64, (3, 48), generator=torch.Generator().manual_seed(7))
    got = torch.zeros(1, 2, 64)
    capture(model, ids, 1, [0], (2, 64), seed=0, batch=2, queries=got)
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids))
    query = layer.self_attn.q_proj(hidden).unflatten(2, (2, 2, 64))  # rotary embedding turns pairs and keeps their sum
    energy = query[:, 16:].square().sum((0, 1, 3))
    torch.testing.assert_close(got[0].view(2, 2, 32).sum(1), energy.view(2, 2, 32).sum(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_capture_far_into_a_context_turns_keys_alone(tiny_model, batch):
    model = load_model(str(tiny_model), "cpu", "float32")
    ids = torch.randint(64, (6, 32), generator=torch.Generator().manual_seed(6))
    far = capture(model, ids, 16, [0, 1], (2, 64), seed=1, batch=batch, furthest=44)
    shifts = []
    for row in range(6):
        got = far.view(2, 2, 6, 16, -1)[:, :, row]
        distances = []
        for shift in range(44 - 32 + 1):
            addresses = torch.arange(32)[None] + shift
            layers = model(ids[row : row + 1], position_ids=addresses, use_cache=True).past_key_values.layers
            expected = torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in layers])
            expected = expected[:, :, :, 16:].transpose(2, 3).flatten(3)
            distances.append(torch.cdist(got, expected).min(-1).values.amax((0, 2)))
        keys, values = torch.stack(distances).T
        assert values.max() < 1e-3 and keys.min() < 1e-3 and (keys < 1e-3).sum() == 1
        shifts.append(int(keys.argmin()))
    assert shifts[:2] == shifts[4:] == [0, 0] and max(shifts[2:4]) > 0


def test_capture_needs_keys_and_values_of_every_layer(tiny_model):
    model = load_model(str(tiny_model), "cpu", "float32")
    ids = torch.ones(1, 32, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"layers \[7\] have no K and V of ordinary attention"):
        capture(model, ids, 16, [1, 7], (2, 64), seed=0, batch=1)
    with pytest.raises(ValueError, match=r"layer 0 has K .* allowed are models with the same KV heads"):
        capture(model, ids, 16, [0], (4, 64), seed=0, batch=1)
