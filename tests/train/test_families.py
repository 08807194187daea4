"""Families with windows, states, sinks, chunks or images: the model that is read, and what is captured of it."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.train.capture import capture, load_model, text_model
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.model import is_causal_lm, read_config, read_facts
from vllm_lexico.train.run import train_dictionary
from vllm_lexico.train.settings import TrainSettings

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import FAMILIES, write_family

TOKENS = 72  # beyond windows, chunks and a longrope's original context


def eager(folder):
    """The same checkpoint with the attention that transformers writes out, and without anything of ours."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForCausalLM if is_causal_lm(read_config(str(folder))) else AutoModelForImageTextToText
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_capture_takes_what_the_cache_would_hold(name, tmp_path):
    folder = write_family(name, tmp_path)
    fingerprint = read_facts(str(folder)).fingerprint
    assert fingerprint.layers == FAMILIES[name][2]
    ids = torch.randint(60, (1, TOKENS), generator=torch.Generator().manual_seed(5))
    plain = eager(folder)
    if name == "cohere2":
        plain.config.sliding_window += 1  # vLLM's windows see one token more
    expected = text_model(plain)(ids, use_cache=True)
    model = load_model(str(folder), "cpu", "float32")
    got = text_model(model)(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, expected.last_hidden_state, atol=2e-4, rtol=2e-4)
    shape = fingerprint.num_kv_heads, fingerprint.head_dim
    store = capture(model, ids, TOKENS - 16, fingerprint.layers, shape, seed=0, batch=1)
    for row, layer in enumerate(fingerprint.layers):
        cache = expected.past_key_values.layers[layer]
        keys = cache.keys
        if name == "llama4":  # vLLM has the first numbers of all pairs that turn together, then the second ones
            keys = keys.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        for kv, vectors in enumerate((keys, cache.values)):
            kept = vectors[0, :, 16:].transpose(0, 1).flatten(1)  # every later position, in some order
            distances = torch.cdist(store[row, kv].flatten(1), kept, compute_mode="donot_use_mm_for_euclid_dist")
            assert distances.amin(0).max() < 1e-3 and distances.amin(1).max() < 1e-3
            assert vectors.std() > 0.05  # so that this says something


@torch.no_grad()
def test_short_texts_are_turned_as_long_ones_where_long_ones_are_served(tmp_path):
    """transformers takes a short text's own factors: which are vLLM's only where no longer one is served."""
    folder = write_family("phi4-mini", tmp_path)
    ids = torch.randint(60, (1, 40), generator=torch.Generator().manual_seed(5))
    own = text_model(eager(folder))(ids, use_cache=True).past_key_values.layers[0]
    apart = []
    for longest in (64, 65):
        model = load_model(str(folder), "cpu", "float32", "", longest)
        store = capture(model, ids, 24, [0], (2, 8), seed=0, batch=1)
        means = store[0].mean(1) - torch.stack([kept[0, :, 16:].mean(1) for kept in (own.keys, own.values)])
        apart.append(means.abs().amax((1, 2)).tolist())
    (key, value), (other_key, other_value) = apart
    assert max(key, value, other_value) < 1e-4 and other_key > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_the_fingerprint_is_that_of_the_model_as_vllm_holds_it(name, tmp_path):
    import transformers
    from vllm.transformers_utils.config import get_config, get_hf_text_config

    kind, settings, layers = FAMILIES[name]
    getattr(transformers, kind)(**settings).save_pretrained(tmp_path)
    served = ModelFingerprint.of(get_hf_text_config(get_config(str(tmp_path), trust_remote_code=False)))
    assert served == read_facts(str(tmp_path)).fingerprint and served.layers == layers


def test_a_dictionary_of_the_full_layers_alone(tmp_path):
    """The whole command, from text that the model writes itself."""
    folder = write_family("gemma3", tmp_path / "model")
    learn = LearnSettings(atoms=16, sparsity=2, batch=64)
    settings = TrainSettings(learn=learn, vectors=96, passes=1, rounds=1, sequence_tokens=64)
    path = train_dictionary(str(folder), settings, name="a/b", out=tmp_path / "d.safetensors", device="cpu")
    made = load_dictionary(path)
    assert made.info.fingerprint == read_facts(str(folder)).fingerprint and made.info.fingerprint.layers == (5,)
    assert made.tensors["key_atoms"].shape == (1, 2, 16, 16) and len(made.info.errors["key"]["7"]) == 1
    made.codebook(5, "value", 3)
    made.check(read_facts(str(folder)).fingerprint, "a/b")


def test_a_dictionary_for_short_sequences_of_a_model_with_two_sets_of_factors(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_family("phi4-mini", tmp_path / "model")
    learn = LearnSettings(atoms=16, sparsity=2, batch=64)
    settings = TrainSettings(learn=learn, vectors=96, passes=1, rounds=1, sequence_tokens=64)
    paths = [
        train_dictionary(str(folder), replace(settings, max_model_len=longest), name="a/b", device="cpu")
        for longest in (None, 64)
    ]
    assert paths[0].name == "a_b.safetensors" and paths[1].name.startswith("a_b+")
    long, short = map(load_dictionary, paths)
    assert long.info.fingerprint.short_context is None and short.info.fingerprint.short_context == 64
    served = ModelFingerprint.of(read_config(str(folder)), 64)
    short.check(served, "a/b")
    with pytest.raises(ValueError, match=r"long in the dictionary, short in the model.*train a/b --max-model-len 64"):
        long.check(served, "a/b")


def test_a_model_that_also_reads_images_writes_its_own_text(tmp_path):
    folder = write_family("qwen2.5-vl", tmp_path / "model")
    learn = LearnSettings(atoms=16, sparsity=2, batch=64)
    settings = TrainSettings(learn=learn, vectors=96, passes=1, rounds=1, sequence_tokens=64)
    path = train_dictionary(str(folder), settings, name="a/b", out=tmp_path / "d.safetensors", device="cpu")
    assert load_dictionary(path).info.fingerprint.model_type == "qwen2_5_vl_text"


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = write_family("gemma3", tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.5.self_attn.k_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 1 of its weights, as model\.layers\.5\.self_attn\.k_proj\.weight; allow"
    ):
        load_model(str(folder), "cpu", "float32")
