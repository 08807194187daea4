"""Fixtures of the training tests: a tiny model, texts, and one thread."""

import json
import lzma
import sys
from pathlib import Path

import pytest
import torch

from vllm_lexico.train import asked, package_text, rounds, run, writing
from vllm_lexico.train.layer_learners import LayerLearners

sys.path.insert(0, str(Path(__file__).parent))  # tests find small_runs.py and the like by their names


@pytest.fixture(autouse=True, scope="module")
def small_shapes(one_thread):
    """Everything that is trained here is small."""


@pytest.fixture(autouse=True)
def short_texts(monkeypatch):
    """So are the texts that are repeated. Returns the usual number and tokens, which other processes take."""
    usual = asked.TEXTS["cpu"]
    monkeypatch.setitem(asked.TEXTS, "cpu", (2, 64))
    return usual


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a random Llama of 2 layers with a tokenizer that knows single letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1} | {chr(97 + at): at + 2 for at in range(26)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Names of two sources."""
    folder = tmp_path_factory.mktemp("texts")
    words = "the quick brown fox jumps over the lazy dog and some more words to read "
    with lzma.open(folder / "a.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"text": words * count}) + "\n" for count in (1, 20))
    (folder / "b.txt").write_text("zzz" * 1000)
    return str(folder / "a.jsonl.xz"), str(folder / "b.txt")


@pytest.fixture
def learned(monkeypatch):
    """(first layer, round, annealed) of what is learned; the call numbered `learned.stop_at` is interrupted."""

    class Learned(list):
        stop_at = None

    seen, learn = Learned(), LayerLearners.learn

    def noted(self, store, passes, number, *, cooling, **more):
        if len(seen) == seen.stop_at:
            raise KeyboardInterrupt
        seen.append((self.layers[0], number, cooling is not None))
        learn(self, store, passes, number, cooling=cooling, **more)

    monkeypatch.setattr(LayerLearners, "learn", noted)
    monkeypatch.setattr(rounds, "LEAST_GAIN", -1e9)  # no round is the last before its time
    return seen


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Have a program run in place of Python's `vllm_writer`."""

    def put(program: str) -> None:
        path = tmp_path / "python"
        path.write_text(program)
        path.chmod(0o755)
        monkeypatch.setattr(writing.sys, "executable", str(path))
        monkeypatch.setattr(writing, "has_vllm", lambda: True)

    return put


@pytest.fixture
def small_package(monkeypatch):
    """A package's text of one letter, which this model never writes so often."""
    documents = {"books": ["z" * 3000] * 20}
    for module in (run, package_text):
        monkeypatch.setattr(module, "package_documents", lambda: documents)
    return documents
