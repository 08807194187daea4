"""A dictionary of text that a model writes under vLLM: from the engine in its own process to the file."""

import torch

from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.train import rounds
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.model import read_config
from vllm_lexico.train.prompts import SHARES
from vllm_lexico.train.run import train_dictionary
from vllm_lexico.train.settings import TrainSettings
from vllm_lexico.train.vllm_writer import inspect_here


def test_a_model_writes_under_vllm_and_learns_from_it(write_letters_model, tmp_path, monkeypatch):
    model = write_letters_model(tmp_path / "model", layers=1, kv_heads=1, head_dim=64)
    read, capture = [], rounds.capture

    def noted(loaded, sequences, *arguments, **more):
        read.append(sequences)
        return capture(loaded, sequences, *arguments, **more)

    monkeypatch.setattr(rounds, "capture", noted)
    settings = TrainSettings(
        learn=LearnSettings(atoms=16, sparsity=4, batch=128), vectors=600, passes=1, rounds=2, sequence_tokens=128,
        dtype="float32", writer="vllm",
    )  # fmt: skip
    path = train_dictionary(str(model), settings, name="me/tiny", out=tmp_path / "d.safetensors", device="cpu")
    made = load_dictionary(path).info.recipe["own_text"]
    assert made["writer"].startswith("vLLM ") and set(made["tokens"]) == set(SHARES) and not made["chat_template"]
    rows = torch.cat(read)
    assert rows.shape == (7, 128) and sum(made["tokens"].values()) >= rows.numel()
    assert rows.min() >= 0 and rows.max() < 64 and len(rows.unique()) > 20  # it is sampled, not repeated
    assert (rows == 0).sum() >= 7  # texts start with the start token


def test_vllm_looks_at_a_models_class_without_a_process_of_its_own(write_letters_model, tmp_path, monkeypatch):
    from vllm import ModelRegistry
    from vllm.model_executor.models import registry

    name, known = "LlamaForCausalLM", dict(ModelRegistry.models)
    monkeypatch.setattr(ModelRegistry, "models", dict(known))
    config = read_config(str(write_letters_model(tmp_path / "model", layers=1, kv_heads=1, head_dim=64)))
    assert config.architectures == [name]
    inspect_here(config)
    changed = {other for other, found in ModelRegistry.models.items() if found is not known.get(other)}
    assert changed == {name}
    monkeypatch.setattr(registry, "_run_in_subprocess", lambda look: look())
    monkeypatch.setattr(registry.envs, "VLLM_CACHE_ROOT", str(tmp_path / "cache"), raising=False)
    assert ModelRegistry.models[name].inspect_model_cls() == known[name].inspect_model_cls()
    config.architectures = ["NoSuchModel"]
    inspect_here(config)  # vLLM says later what is wrong
    assert "NoSuchModel" not in ModelRegistry.models
