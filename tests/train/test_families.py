"""Families with windows, states, sinks, chunks or images: the model that is read, and what is captured of it."""

import sys
from pathlib import Path

import pytest
import torch

from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.train.capture import capture, load_model, text_model
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.model import is_causal_lm, read_config, read_facts
from vllm_lexico.train.run import train_dictionary
from vllm_lexico.train.settings import TrainSettings

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, write_family

TOKENS = 40  # beyond windows, chunks and a longrope's original context


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
    expected = text_model(eager(folder))(ids, use_cache=True)
    model = load_model(str(folder), "cpu", "float32")
    got = text_model(model)(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(got, expected.last_hidden_state, atol=2e-4, rtol=2e-4)
    shape = fingerprint.num_kv_heads, fingerprint.head_dim
    store = capture(model, ids, TOKENS - 16, fingerprint.layers, shape, seed=0, batch=1)
    for row, layer in enumerate(fingerprint.layers):
        cache = expected.past_key_values.layers[layer]
        for kv, vectors in enumerate((cache.keys, cache.values)):
            kept = vectors[0, :, 16:].transpose(0, 1).flatten(1)  # every later position, in some order
            distances = torch.cdist(store[row, kv].flatten(1), kept)
            assert distances.amin(0).max() < 1e-3 and distances.amin(1).max() < 1e-3
            assert vectors.std() > 0.05  # so that this says something


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
