"""What `vllm-lexico train` refuses: in one line, with status 2, before the model's weights are loaded."""

import argparse
import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from vllm_lexico import cli
from vllm_lexico.cli import train as command
from vllm_lexico.train import model, rounds, writing


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch):
    def load(*_):
        raise AssertionError("work has started")

    monkeypatch.setattr(rounds, "load_model", load)
    rounds.texts_of.cache_clear()


def refusal(arguments: list[str], capsys) -> str:
    assert cli.main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("vllm-lexico: error: ") and error.count("\n") == 1
    assert error.rstrip("\n").isprintable() and len(error) < 600
    return error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--atoms", "5000"], "--atoms is 5000; allowed: 2 to 4096"),
        (["--sparsity", "32"], "--sparsity is 32; allowed: 1 to 31"),
        (["--key-metric", "nan"], "--key-metric is nan; allowed: 0 to 1"),
        (["--passes", "0"], "--passes is 0; allowed: 1 or more"),
        (["--rounds", "0"], "--rounds is 0; allowed: 1 or more"),
        (["--atoms", "4096", "--vectors", "8191"], "--vectors is 8191; allowed: 8192 or more (2 per atom)"),
        (["--sequence-tokens", "63"], "--sequence-tokens is 63; allowed: 64 or more"),
        (["--sequence-tokens", "0"], "--sequence-tokens is 0; allowed: 64 or more"),
        (["--sequence-tokens", "4096"], "--sequence-tokens is 4096; allowed: up to 2048, the model's longest"),
        (["--seed", str(2**70)], f"--seed is {2**70}; allowed: 0 to 4294967295"),
        (["--max-model-len", "0"], "--max-model-len is 0; allowed: 1 or more"),
        (["--max-model-len", "4096"], "--max-model-len was given as 4096; allowed: up to 2048, the model's longest"),
        (["--seed", "-1"], "--seed is -1; allowed: 0 to 4294967295"),
        (["--hf-overrides", "yarn"], "--hf-overrides was given as 'yarn'; allowed: a JSON object, as in"),
        (["--hf-overrides", "[1]"], "--hf-overrides was given as '[1]'; allowed: a JSON object, as in"),
        (["--hf-overrides", "[" * 99999], "allowed: a JSON object, as in"),
        (["--hf-overrides", '{"rope_parameters": 7}'], "allowed: what fits"),
        (["--hf-overrides", '{"num_attention_heads": "many"}'], "allowed: what fits"),
        (["--data", "absent.txt"], "--data is absent.txt; allowed: files and folders that exist, or a Hugging"),
        (["--data", ""], "--data is ''; allowed: files and folders that exist"),
        (["--data", "a\0b"], "allowed: files and folders that exist"),
        (["--device", "abacus"], "--device is abacus; allowed: cpu, cuda"),
        (["--out", ""], "the file to write, ., is there and no file; give the name of a file"),
        (["--out", "/"], "the file to write, /, is there and no file"),
        (["--out", "/dev/null"], "the file to write, /dev/null, is there and no file"),
        (["--out", "/dev/null/d.safetensors"], "/dev/null is no folder"),
        (["--out", "d.png"], "allowed: any suffix but .png"),
        (["--name", ""], "the model's name was given as ''; allowed: one line of printable text, not blank"),
        (["--name", "  "], "the model's name was given as ' '; allowed"),
        (["--name", "a\nb"], r"the model's name was given as 'a\nb'; allowed"),
        (["--name", "\x1b[31mred"], r"the model's name was given as '\x1b[31mred'; allowed"),
        (["--name", "\udc80"], r"the model's name was given as '\udc80'; allowed"),
    ],
)
def test_flags(tiny_model, arguments, words, capsys):
    assert words in refusal([str(tiny_model), *arguments], capsys)


DATA = ["--data", str(Path(__file__).parent)]
NOTHING = ["--rounds", "0", "--continue-from", "d.safetensors"]


@pytest.mark.parametrize(
    ("flag", "given"),
    [
        ("--writer", "auto"),
        ("--writer", "vllm"),
        ("--writer", "transformers"),
        ("--text-tokens", "256"),
        ("--package-text", "0.8"),
        ("--package-text", "0.0"),
    ],
)
@pytest.mark.parametrize("beside", [DATA, NOTHING])
def test_flags_that_only_matter_where_the_model_writes(tiny_model, flag, given, beside, capsys):
    words = "--data, which is all that is read" if beside is DATA else "--rounds 0, which learns nothing"
    error = refusal([str(tiny_model), *beside, flag, given], capsys)
    assert f"{flag} is {given}; allowed: none with {words}; change it" in error


@pytest.mark.parametrize(
    ("flag", "given"), [("--vectors", "9000"), ("--passes", "3"), ("--sparsity", "10"), ("--key-metric", "0.5")]
)
@pytest.mark.parametrize("data", [[], DATA])
def test_flags_of_learning_where_nothing_is_learned(tiny_model, flag, given, data, capsys):
    error = refusal([str(tiny_model), *NOTHING, *data, flag, given], capsys)
    assert f"{flag} is {given}; allowed: none with --rounds 0, which learns nothing; change it" in error


def test_a_length_of_vllms_texts_that_transformers_writes(tiny_model, capsys):
    error = refusal([str(tiny_model), "--writer", "transformers", "--text-tokens", "256"], capsys)
    assert "--text-tokens is 256; allowed: none with --writer transformers, as it is for texts that vLLM" in error


def test_what_is_usual_where_no_flag_is_given():
    """No flag that is refused beside another counts as given by itself."""
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    for more in ([], DATA, NOTHING, [*NOTHING, *DATA], ["--continue-from", "d.safetensors", *DATA]):
        settings = command.settings_of(parser.parse_args(["train", "some/model", "--device", "cpu", *more]))
        assert (settings.writer, settings.text_tokens, settings.package_text) == ("auto", 256, 0.8)
        assert (settings.learn.sparsity, settings.learn.key_metric, settings.learn.atom_bits) == (10, 0.5, 8)
    given = ["--writer", "vllm", "--sparsity", "7", "--key-metric", "0", "--package-text", "0", "--atom-bits", "4"]
    settings = command.settings_of(parser.parse_args(["train", "some/model", "--device", "cpu", *given]))
    assert (settings.writer, settings.package_text) == ("vllm", 0)
    assert (settings.learn.sparsity, settings.learn.key_metric, settings.learn.atom_bits) == (7, 0, 4)


def test_a_file_that_is_something_else_is_not_replaced(tiny_model, tmp_path, capsys):
    out = tmp_path / "d.safetensors"
    out.write_text("mine")
    assert "is there" in refusal([str(tiny_model), "--out", str(out)], capsys)
    assert out.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("null", 'line 2, has no "text" that is a string'),
        ("7", 'line 2, has no "text" that is a string'),
        ('{"text": null}', 'line 2, has no "text" that is a string'),
        ('{"text": ["a"]}', 'line 2, has no "text" that is a string'),
        (r'{"text": "\ud800"}', "line 2, has half a character (a lone surrogate)"),
        ("[" * 100_000, "line 2, cannot be read"),
        ("9" * 5000, "line 2, cannot be read"),
        ("{", "line 2, cannot be read"),
    ],
)
def test_lines(tiny_model, tmp_path, line, words, capsys):
    data = tmp_path / "a.jsonl"
    data.write_text(json.dumps({"text": "abc" * 100}) + f"\n{line}\n")
    error = refusal([str(tiny_model), "--data", str(data), "--out", str(tmp_path / "d.safetensors")], capsys)
    assert words in error and 'allowed: one JSON object with a "text" field per line; fix it or leave it out' in error
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_too_little_text_for_one_sequence(tiny_model, tmp_path, capsys):
    long, short = tmp_path / "a.txt", tmp_path / "b.txt"
    long.write_text("a" * 64)
    short.write_text("a")
    arguments = [str(tiny_model), "--sequence-tokens", "64", "--out", str(tmp_path / "d.safetensors"), "--data"]
    error = refusal([*arguments, str(long), str(short)], capsys)
    assert f"--data {short} has 1 tokens; allowed: 64 or more, a whole sequence; add text, or lower" in error


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "falcon"}, "is of type falcon, whose keys and values cannot be captured"),
        ({"model_type": "gptj"}, "is of type gptj, whose keys and values cannot be captured"),
        (
            {"model_type": "mamba"},
            "the model of type 'mamba' has no attention layer whose cache grows with the context",
        ),
        ({"model_type": "t5"}, "(t5): encoder and encoder-decoder attention is not supported, only decoders; choose"),
        ({"model_type": "clip"}, "is of type clip, of which transformers has no decoder that reads text alone"),
        ({"model_type": "bart"}, "(bart): encoder and encoder-decoder attention is not supported, only decoders"),
        ({"model_type": "no-such-model"}, "cannot be read"),
        ({"model_type": "no-such-model"}, "allowed are decoders with transformers' common attention, such as Llama"),
        ({}, "cannot be read"),
        ([], "cannot be read"),
        (None, "config.json"),
    ],
)
def test_models(tmp_path, config, words, capsys):
    model = tmp_path / "model"
    model.mkdir()
    if config is not None:
        (model / "config.json").write_text(json.dumps(config))
    assert words in refusal([str(model), "--out", str(tmp_path / "d.safetensors")], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def no_vllm_starts(monkeypatch):
    def start(*_, **__):
        raise AssertionError("vLLM is started")

    monkeypatch.setattr(writing, "has_vllm", lambda: True)
    monkeypatch.setattr(writing, "write", start)


@pytest.mark.parametrize("kept", [(), ("tokenizer.json", "tokenizer_config.json")])
@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("adding", [[], ["--rounds", "0", "--continue-from", "absent"]])
def test_a_folder_without_weights(tiny_model, tmp_path, texts, no_vllm_starts, kept, data, adding, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "training_args.bin").touch()
    (folder / "model.safetensors").symlink_to(tmp_path / "absent")  # as of a cache whose blobs are gone
    for name in ("config.json", *kept):
        shutil.copy(tiny_model / name, folder)
    arguments = [str(folder), *adding, *(["--data", *texts] if data else []), "--out", str(tmp_path / "d.safetensors")]
    assert refusal(arguments, capsys) == (
        f"vllm-lexico: error: the folder {folder} has config.json but no weights (*.safetensors or "
        "pytorch_model*.bin); give the whole checkpoint\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])  # transformers makes an empty tokenizer for the second
def test_a_folder_without_a_tokenizer(tiny_model, tmp_path, texts, weights, kind, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((tiny_model / "config.json").read_text()) | {"model_type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / weights).touch()
    arguments = [str(folder), "--out", str(tmp_path / "d.safetensors"), "--data", *texts]
    assert refusal(arguments, capsys) == (
        f"vllm-lexico: error: the folder {folder} has no tokenizer that transformers can read (as tokenizer.json), "
        "which the text of --data needs; give the whole checkpoint\n"
    )


def test_a_model_of_the_hub_is_not_asked_for_its_files(monkeypatch):
    monkeypatch.setattr(model, "read_tokenizer", lambda _: None)
    model.check_folder("some/model", reads=True)


def test_a_folder_that_cannot_be_written(tiny_model, tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = [str(tiny_model), "--out", str(tmp_path / "file" / "d.safetensors")]
    assert str(tmp_path / "file") in refusal(arguments, capsys)


def refuse_folders(monkeypatch, refused):
    """No folder can be made in `refused`, whoever asks: root may do so everywhere."""
    mkdir = os.mkdir

    def make(path, *more, **options):
        if Path(path).parent == refused:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        mkdir(path, *more, **options)

    monkeypatch.setattr(os, "mkdir", make)


@pytest.mark.parametrize("file", ["d.safetensors", "new/folder/d.safetensors"])
def test_a_folder_that_takes_nothing(tiny_model, tmp_path, monkeypatch, file, capsys):
    out = tmp_path / file
    refuse_folders(monkeypatch, tmp_path)
    assert refusal([str(tiny_model), "--out", str(out)], capsys) == (
        f"vllm-lexico: error: --out is {out}, and {tmp_path} cannot be written to (Read-only file system); "
        "allowed: a file in a folder that can; name another\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_link_to_a_folder_that_takes_nothing(tiny_model, tmp_path, monkeypatch, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "d.safetensors").symlink_to(tmp_path / "other" / "d.safetensors")
    refuse_folders(monkeypatch, tmp_path / "other")
    error = refusal([str(tiny_model), "--out", str(tmp_path / "d.safetensors")], capsys)
    assert f"and {tmp_path / 'other'} cannot be written to (Read-only file system)" in error


def test_a_cache_that_takes_nothing(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    refuse_folders(monkeypatch, tmp_path)
    error = refusal([str(tiny_model), "--name", "me/tiny"], capsys)
    out = tmp_path / "vllm-lexico" / "me_tiny.safetensors"
    assert f"--out is not given, and its default is {out}, and {tmp_path} cannot be written to (Read-only" in error
    assert error.endswith("; give --out\n")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_proc_is_no_place_for_a_file(tiny_model, capsys):
    error = refusal([str(tiny_model), "--out", "/proc/d.safetensors"], capsys)
    assert "--out is /proc/d.safetensors, and /proc cannot be written to (" in error
