"""What the command line names has to be there before data is fetched or an engine starts."""

import json
import re
import shlex

import pytest

from vllm_lexico import cli
from vllm_lexico.dictionary.search import bundled_folder

BUNDLED = bundled_folder() / "HuggingFaceTB_SmolLM2-135M-Instruct.safetensors"


@pytest.fixture
def begun(monkeypatch, tmp_path):
    """What was begun, data or an evaluation; none of it is done. In the user's folder is a model, and little else."""
    calls = []

    def run(settings, caches, *_, **__):
        calls.append([cache.name for cache in caches])
        raise ValueError("not run")

    monkeypatch.setattr("vllm_lexico.evals.fetch.fetch_data", lambda tasks: calls.append("data") or tmp_path)
    monkeypatch.setattr("vllm_lexico.evals.run.run_evaluation", run)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for folder in ("model", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("no dictionary")
    return calls


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("/nothere --out o", "MODEL was given as '/nothere'; allowed: a folder with a model, or a Hugging Face id"),
        ("empty --out o", "the folder empty has no config.json; name the folder of a model"),
        ("org/none --out o", "config.json of the model org/none is not in the hub's cache, and HF_HUB_OFFLINE is set"),
        ("model --out file", "--out file is a file; allowed: a folder, which may be missing; give another"),
        ("model --out file/o", "--out file/o would lie in file, which is a file; allowed: a folder"),
        ("model --out o --dictionary nothere", "dictionary was given as 'nothere'; allowed: a file, or a hub id"),
        ("model --out o --dictionary empty", "and this is a folder; it holds no dictionary, so name another"),
        ("model --out o --dictionary file", "file is damaged, cut short or no safetensors file"),
        ("model --out o --dictionary org/none", "could not be had from the hub"),
        ("model --out o --caches lexico:7+dictionary=nothere", "dictionary was given as 'nothere'"),
        ("model --out o --caches bf16 --dictionary nothere", "dictionary was given as 'nothere'"),
    ],
)
def test_what_is_not_there_is_refused_first(begun, command, words, capsys):
    for more in ("--quick", "--data empty --tasks wikitext"):
        assert cli.main(["eval", *shlex.split(f"{command} {more}")]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1
        assert said.err.startswith("vllm-lexico: error: ") and words in said.err
    assert begun == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_model_length": 512}, "given as 'max_model_length'; allowed: .*; write max_model_len, or remove it"),
        ({"dtype": "float32", "model": "other"}, "given as 'model'; allowed: .* but for model; .*"),
        ({"zzzz": 1}, "given as 'zzzz'; allowed: .*; remove it"),
    ],
)
def test_arguments_that_vllm_does_not_take_are_refused_first(begun, given, words, capsys):
    pytest.importorskip("vllm")
    command = ["eval", "model", "--out", "o", "--engine-arguments", json.dumps(given)]
    assert cli.main(command) == 2 and begun == []
    assert re.search(f"error: --engine-arguments was {words}$", capsys.readouterr().err.strip())


def test_what_is_there_goes_on(begun):
    pytest.importorskip("vllm")
    engine = json.dumps({"kv_cache_memory_bytes": 10**9, "hf_overrides": {}, "chat_template": None})
    command = ["eval", "model", "--out", "o/p", "--dictionary", str(BUNDLED), "--engine-arguments", engine]
    assert cli.main([*command, "--caches", "bf16,lexico:7+dictionary=train"]) == 2
    assert begun == ["data", ["bf16", "lexico:7+dictionary=train"]]


def test_a_revision_in_the_hubs_cache_is_enough(begun, tmp_path, capsys):
    """The newest one need not be there."""
    pytest.importorskip("vllm")
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = tmp_path / "hub" / "models--org--old" / "snapshots" / commit
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    command = ["eval", "org/old", "--out", "o", "--caches", "bf16"]
    assert cli.main(command) == 2 and begun == []
    assert "is not in the hub's cache" in capsys.readouterr().err
    assert cli.main([*command, "--engine-arguments", json.dumps({"revision": commit})]) == 2
    assert begun == ["data", ["bf16"]]
