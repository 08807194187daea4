"""Where a configuration and the size of the weights come from, and what is said where they cannot be had."""

import shutil
import types

import pytest

from vllm_lexico import cli
from vllm_lexico.check import source


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that has one model, in its cache once it was fetched; `hub.error` is what it raises instead."""
    import huggingface_hub

    fake = types.SimpleNamespace(error=None, cached=False, folder=tmp_path / "snapshot", siblings=[])
    fake.folder.mkdir()

    def answer(*_, **__):
        if fake.error is not None:
            raise fake.error
        return types.SimpleNamespace(siblings=fake.siblings, status_code=200)

    def download(model, file, **_):
        answer()
        return str(fake.folder / file)

    session = types.SimpleNamespace(head=answer)
    monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    cached = lambda model, file, **_: str(fake.folder / file) if fake.cached else None  # noqa: E731
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", answer)
    return fake


def error(capsys, model):
    assert cli.main(["check", model, "--gpu-memory", "80GiB"]) == 2
    words = capsys.readouterr()
    assert words.out == "" and words.err.startswith("vllm-lexico: error: ") and words.err.count("\n") == 1
    return words.err


def hub_error(kind):
    """An error of the hub's client, as it raises it for an answer."""
    import httpx
    from huggingface_hub import errors

    if not issubclass(getattr(errors, kind), errors.HfHubHTTPError):
        return getattr(errors, kind)("no network")
    return getattr(errors, kind)("404", response=httpx.Response(404, request=httpx.Request("HEAD", "https://hub")))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("RepositoryNotFoundError", "is not on the Hugging Face hub, or is private: check its name"),
        ("GatedRepoError", "is for those who accepted its terms: accept them on its page, and log in"),
        ("RemoteEntryNotFoundError", "has no config.json on the Hugging Face hub; name a folder with the model"),
        ("OfflineModeIsEnabled", "is not in the hub's cache, and HF_HUB_OFFLINE is set: unset it, or name a folder"),
    ],
)
def test_a_model_that_the_hub_does_not_give(kind, words, hub, capsys):
    hub.error = hub_error(kind)
    assert f"the model org/model {words}" in error(capsys, "org/model")


def test_a_hub_that_is_overloaded_is_no_missing_file(hub, capsys):
    hub.error = hub_error("LocalEntryNotFoundError")
    words = error(capsys, "org/model")
    assert "the Hugging Face hub does not answer (LocalEntryNotFoundError: no network): go online once" in words


def test_a_hub_that_does_not_answer(hub, capsys):
    hub.error = ConnectionError("Name or service\n not known")
    words = error(capsys, "org/model")
    assert (
        "config.json of the model org/model is not in the hub's cache, and the Hugging Face hub does not answer"
        in words
    )
    assert "(ConnectionError: Name or service not known): go online once, or name a folder" in words


def test_what_is_cached_needs_no_hub(hub, write_family, capsys):
    shutil.copy(f"{write_family('Qwen3-8B')}/config.json", hub.folder)
    hub.cached, hub.error = True, ConnectionError("offline")
    assert cli.main(["check", "Qwen/Qwen3-8B", "--gpu-memory", "80GiB"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "Qwen/Qwen3-8B (qwen3): LEXICO serves it." in words and "15.3 GiB (from its configuration)" in words


def test_what_is_fetched_has_the_size_that_the_hub_says(hub, write_family, capsys):
    shutil.copy(f"{write_family('Qwen3-8B')}/config.json", hub.folder)
    files = [("model-1.safetensors", 4 << 30), ("model-2.safetensors", 2 << 30), ("onnx/model.safetensors", 1 << 40)]
    hub.siblings = [types.SimpleNamespace(rfilename=name, size=size) for name, size in files]
    assert cli.main(["check", "Qwen/Qwen3-8B", "--gpu-memory", "80GiB"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "weights 6.0 GiB (from the sizes of its files on the hub)" in words, words


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([("model.safetensors", 10), ("pytorch_model.bin", 11)], 10),
        ([("model-1.safetensors", 10), ("model-2.safetensors", 5), ("consolidated.safetensors", 15)], 15),
        ([("consolidated.safetensors", 15)], 15),
        ([("pytorch_model.bin", 11), ("training_args.bin", 1), ("config.json", 3)], 11),
        ([("original/consolidated.pt", 9), ("model.gguf", 4)], 4),
        ([("config.json", 3)], 0),
    ],
)
def test_files_that_vllm_loads(files, expected):
    assert source.weight_bytes(files) == expected


def test_weights_of_a_folder(tmp_path):
    assert source.find_weights(str(tmp_path), tmp_path) is None
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    assert source.find_weights(str(tmp_path), tmp_path) == (100, "the sizes of its files")
    for damaged in ("", "{}", '{"metadata": {"total_size": "many"}}', '{"metadata": {"total_size": -1}}'):
        (tmp_path / source.INDEX).write_text(damaged)
        assert source.find_weights(str(tmp_path), tmp_path) == (100, "the sizes of its files")
    (tmp_path / source.INDEX).write_text('{"metadata": {"total_size": 90}}')
    assert source.find_weights(str(tmp_path), tmp_path) == (90, f"its {source.INDEX}")


def test_what_is_no_model(tmp_path, write_family, capsys):
    assert "allowed: a folder with a model, or a Hugging Face id" in error(capsys, str(tmp_path / "nowhere"))
    assert "has no config.json; name the folder of a model" in error(capsys, str(tmp_path))
    folder = tmp_path / "Qwen3-8B"
    write_family("Qwen3-8B")
    (folder / "config.json").write_text("{")
    assert "is not a valid JSON file" in error(capsys, str(folder))
    (folder / "config.json").write_text('{"model_type": "nobody-knows-it"}')
    assert f"the configuration of {folder} cannot be read" in error(capsys, str(folder))
