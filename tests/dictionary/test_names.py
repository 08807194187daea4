"""Names of models: which mean one model, and file names that never collide."""

import os

import pytest

from vllm_lexico.dictionary.names import (
    alike,
    check_name,
    file_name,
    plain_name,
    printable,
    same_model,
    train_command,
    unquantized,
)

SNAPSHOT = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B/snapshots/0123456789abcdef"


def test_file_names():
    assert file_name("Qwen/Qwen2.5-7B") == "Qwen_Qwen2.5-7B.safetensors"
    assert file_name("org/name_with_underscores") == "org_name_with_underscores.safetensors"
    assert file_name("gpt2") == "gpt2.safetensors"
    assert file_name(SNAPSHOT) == "Qwen_Qwen2.5-7B.safetensors"
    assert file_name("gpt2", "{}") == "gpt2+44136fa3.safetensors"


def test_file_names_never_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("run-A/checkpoint", "run-B/checkpoint", "my model", "c"):
        (tmp_path / folder).mkdir(parents=True)
    names = ["a/b/c", "c", "b/c", "b_c", "b_/c", "/c", "run-A/checkpoint", "run-B/checkpoint", "checkpoint", "my model"]
    names += ["my_model", "my/model", "my@model", "ö", "ü", "x" * 300, "x" * 301, "/", "..", "--", "a--b/c", "a/--b/c"]
    files = [file_name(name) for name in names]
    assert len({name.casefold() for name in files}) == len(names)
    for name in files:
        assert name.endswith(".safetensors") and len(name) < 255 and os.sep not in name and name.isascii()
    assert file_name("run-A/checkpoint") == file_name(str(tmp_path / "run-A" / "checkpoint"))
    assert file_name("run-A/checkpoint").startswith("checkpoint@")


@pytest.mark.parametrize("name", ["", " ", "\t", "a\nb", "\x1b[31mred", "a\u202eb", "\ud800", None, 7])
def test_what_no_model_can_be_called(name):
    with pytest.raises(ValueError, match=r"the model's name .*allowed: one line of printable text") as refused:
        check_name(name)
    assert str(refused.value).isprintable()
    if isinstance(name, str):
        with pytest.raises(ValueError, match="the model's name was given as"):
            file_name(name)


def test_snapshots_of_the_hubs_cache_are_the_models_that_they_hold(tmp_path):
    assert plain_name(SNAPSHOT) == plain_name(SNAPSHOT + "/") == "Qwen/Qwen2.5-7B"
    assert plain_name("/hub/models--gpt2/snapshots/abc") == "gpt2"
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "link").symlink_to(snapshot)
    assert plain_name(str(tmp_path / "link")) == "org/name"
    assert plain_name(str(snapshot.parent)) == str(snapshot.parent)


def test_same_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    assert same_model("org/Model", "ORG/model") and not same_model("org/model", "other/model")
    assert same_model("Qwen/qwen2.5-7B", SNAPSHOT)
    assert same_model("org/model", "/data/org/Model") and not same_model("org/model", "/data/corg/model")
    assert same_model("run/checkpoint", str(tmp_path / "run" / "checkpoint"))
    for one, other in (("org/model", "/data/models/Model"), ("/a/checkpoint", "/b/checkpoint"), ("a/model", "model")):
        assert not same_model(one, other) and not same_model(other, one)


@pytest.mark.parametrize(
    "twin",
    [
        "Qwen/Qwen3-8B-AWQ", "Qwen/Qwen3-8B-FP8", "org/Qwen3-8B-FP8-dynamic", "org/Qwen3-8B-GPTQ-Int4",
        "Qwen3-8B-bnb-4bit",
        "org/Qwen3-8B-quantized.w4a16", "org/qwen3-8b-w8a8", "org/Qwen3-8B-NVFP4", "org/Qwen3-8B-AWQ-4bit",
        "/data/Qwen3-8B-FP8_block", "org/Qwen3-8B-unsloth-bnb-4bit", "org/Qwen3-8B-FP8-KV", "org/Qwen3-8B-gptq-8bit",
    ],
)  # fmt: skip
def test_quantized_twins_are_alike(twin):
    assert alike("Qwen/Qwen3-8B", twin) and alike(twin, "Qwen/Qwen3-8B") and alike(twin, "org/Qwen3-8B-AWQ")
    assert not same_model("Qwen/Qwen3-8B", twin)


def test_what_only_looks_quantized_is_another_model():
    for other in ("Qwen/Qwen3-8B-Instruct-AWQ", "org/Qwen3-8B-AWQ-chat", "org/Qwen3", "org/Qwen3-8B-4bits-math", "AWQ"):
        assert not alike("Qwen/Qwen3-8B", other)
    assert unquantized("AWQ") == "awq" and unquantized("int4-model-AWQ") == "int4-model"


def test_alike():
    assert alike("org/model", "/data/models/Model") and alike("org/model", "model")
    assert not alike("/a/checkpoint", "/b/checkpoint") and not alike("org/model", "/data/models/other")


def test_nothing_raw_reaches_the_terminal():
    assert printable("a\nb\x1b[31mç\ud800") == "a\\nb\\x1b[31mç\\ud800"
    assert train_command("a\nb") == "vllm-lexico train 'a\\nb'"
    assert train_command("a", '{"b": 1}') == "vllm-lexico train a --hf-overrides '{\"b\": 1}'"
    assert train_command(SNAPSHOT) == "vllm-lexico train Qwen/Qwen2.5-7B"
