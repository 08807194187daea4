"""Where dictionaries are looked for, and that what is asked for by name wins."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_lexico.dictionary import search
from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.search import DictionaryNotFoundError, find_dictionary

NAME = "someone/some-model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def addresses(tmp_path, monkeypatch):
    """Folders that stand for the bundled ones and the user's cache, and an empty hub that counts calls."""
    calls: list[str] = []

    def no_hub(repo: str, file: str, revision: str | None = None) -> bool:
        calls.append(f"{repo}/{file}@{revision}")
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(search, "bundled_folder", lambda: tmp_path / "bundled")
    monkeypatch.setattr(search, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(search, "_answers", no_hub)
    monkeypatch.setattr(search, "_download", no_hub)
    (tmp_path / "bundled").mkdir()
    return SimpleNamespace(bundled=tmp_path / "bundled", cache=tmp_path / "cache", calls=calls)


@pytest.fixture
def listed(addresses):
    """The package lists a dictionary on the hub for the model."""
    entry = {"repository": "the-project/some-model-lexico", "revision": COMMIT}
    (addresses.bundled / "hub.json").write_text(json.dumps({NAME: entry}))


def test_search_prefers_the_same_model_then_its_twins_and_the_users_own(addresses, make_dictionary, fingerprint):
    def find() -> Path:
        return find_dictionary(None, NAME, fingerprint)

    make_dictionary(name="a/twin").save(addresses.bundled / "a_twin.safetensors")
    make_dictionary(fingerprint=replace(fingerprint, model_type="gemma")).save(addresses.cache / "wrong.safetensors")
    (addresses.cache / "broken.safetensors").write_text("broken")
    assert find() == addresses.bundled / "a_twin.safetensors"
    make_dictionary(name="a/twin").save(addresses.cache / "twin.safetensors")
    assert find() == addresses.cache / "twin.safetensors"
    make_dictionary().save(addresses.bundled / "some-model.safetensors")
    assert find() == addresses.bundled / "some-model.safetensors"
    make_dictionary().save(addresses.cache / "mine.safetensors")
    assert find() == addresses.cache / "mine.safetensors"
    assert not addresses.calls  # nobody was asked who only happens to own a name on the hub


def test_a_snapshots_folder_finds_its_models_own(addresses, make_dictionary, fingerprint, tmp_path):
    make_dictionary(name="a/fine-tune").save(addresses.cache / "a.safetensors")
    make_dictionary().save(addresses.cache / "z.safetensors")
    snapshot = tmp_path / "hub" / "models--someone--some-model" / "snapshots" / COMMIT
    assert find_dictionary(None, str(snapshot), fingerprint) == addresses.cache / "z.safetensors"


@pytest.mark.parametrize("name", ["org/some-model-AWQ", "org/some-model-FP8-dynamic", "/data/some-model-GPTQ-Int4"])
def test_a_quantized_twin_is_served_and_one_line_says_so(addresses, make_dictionary, fingerprint, caplog, name):
    """Though another model has its shape; at every start in one line, which is no warning."""
    make_dictionary(name="a/fine-tune").save(addresses.cache / "a.safetensors")
    make_dictionary().save(addresses.cache / "z.safetensors")
    caplog.set_level(logging.INFO, logger="vllm.lexico")
    path = find_dictionary(None, name, fingerprint)
    assert path == addresses.cache / "z.safetensors"
    load_dictionary(path).check(fingerprint, name)
    (line,) = caplog.records
    said = line.getMessage()
    assert line.levelno == logging.INFO and said.startswith(f"the dictionary of {NAME} serves {name}: their names end")
    assert "\n" not in said


def test_of_a_model_and_its_twins_the_served_one_is_taken_else_the_one_that_is_not_quantized(
    addresses, make_dictionary, fingerprint
):
    make_dictionary(name=f"{NAME}-AWQ").save(addresses.cache / "a.safetensors")
    make_dictionary().save(addresses.cache / "z.safetensors")
    make_dictionary(name=f"{NAME}-FP8").save(addresses.cache / "f.safetensors")
    for served, file in (("some-model", "z"), ("some-model-AWQ", "a"), ("some-model-GPTQ-Int4", "z")):
        assert find_dictionary(None, f"/models/{served}", fingerprint) == addresses.cache / f"{file}.safetensors"


def test_none_of_several_is_taken_without_being_named(addresses, make_dictionary, fingerprint):
    twins = [addresses.cache / "a_twin.safetensors", addresses.cache / "b_twin.safetensors"]
    for path in twins:
        make_dictionary(name=path.stem.replace("_", "/")).save(path)
    with pytest.raises(DictionaryNotFoundError) as refused:
        find_dictionary(None, NAME, fingerprint)
    words = str(refused.value)
    assert f"of several other models fit its shape: a/twin ({twins[0]}), b/twin ({twins[1]}). Name one" in words
    assert f'--additional-config \'{{"lexico": {{"dictionary": "{twins[0]}"}}}}\'' in words
    assert words.endswith(f"vllm-lexico train {NAME}")
    assert find_dictionary(str(twins[1]), NAME, fingerprint) == twins[1]
    make_dictionary(name="a/twin").save(addresses.bundled / "a_twin.safetensors")
    twins[1].unlink()
    assert find_dictionary(None, NAME, fingerprint) == twins[0]  # two of one model


def test_a_model_that_is_served_otherwise_is_told_how_it_differs(addresses, make_dictionary, fingerprint):
    """Its rotary embedding was changed by --hf-overrides."""
    make_dictionary().save(addresses.bundled / "its-own.safetensors")
    overrides = '{"rope_parameters": {"rope_type": "yarn"}}'
    with pytest.raises(DictionaryNotFoundError) as error:
        find_dictionary(None, NAME, replace(fingerprint, rope='{"rope_type": "yarn"}'), overrides)
    said = str(error.value)
    own, path = fingerprint.rope, addresses.bundled / "its-own.safetensors"
    differs = f'({path} differs; rope: {own} in the dictionary, {{"rope_type": "yarn"}} in the model)'
    assert said.startswith(f"no dictionary for {NAME} as it is served {differs}. Searched: ")
    assert said.endswith(f"vllm-lexico train {NAME} --hf-overrides '{overrides}'")


def test_a_folder_with_the_models_name_comes_before_other_shapes(addresses, make_dictionary, fingerprint):
    make_dictionary(name="a/twin").save(addresses.cache / "a.safetensors")
    make_dictionary().save(addresses.cache / "z.safetensors")
    assert find_dictionary(None, "/models/some-model", fingerprint) == addresses.cache / "z.safetensors"


def test_search_takes_the_listed_one_on_the_hub_before_a_twin(
    addresses, listed, make_dictionary, fingerprint, monkeypatch, tmp_path
):
    make_dictionary(name="a/twin").save(addresses.bundled / "a_twin.safetensors")
    monkeypatch.setattr(search, "_answers", lambda repo, file, revision: True)
    monkeypatch.setattr(search, "_download", lambda repo, file, revision: tmp_path / repo / revision / file)
    found = find_dictionary(None, NAME.upper(), fingerprint)
    assert found == tmp_path / "the-project" / "some-model-lexico" / COMMIT / "dictionary.safetensors"


def test_nothing_found_says_where_and_what_to_do(addresses, fingerprint, tmp_path):
    with pytest.raises(ValueError) as refused:
        find_dictionary(None, NAME, fingerprint)
    words = str(refused.value)
    for expected in (NAME, str(addresses.bundled), str(addresses.cache), "not the Hugging Face hub"):
        assert expected in words
    assert words.endswith(f"vllm-lexico train {NAME}") and not addresses.calls


def test_a_hub_that_does_not_answer_is_named(addresses, listed, fingerprint):
    with pytest.raises(ValueError, match=r"hub \(the-project/some-model-lexico: ConnectionError"):
        find_dictionary(None, NAME, fingerprint)


def test_setting(addresses, fingerprint, monkeypatch, tmp_path):
    path = tmp_path / "d.safetensors"
    path.touch()
    assert find_dictionary(str(path), NAME, fingerprint) == path
    asked = []
    monkeypatch.setattr(search, "_download", lambda repo, file: asked.append((repo, file)) or path)
    assert find_dictionary("org/name", NAME, fingerprint) == path
    assert find_dictionary("org/name/deep/file.safetensors", NAME, fingerprint) == path
    assert asked == [("org/name", "dictionary.safetensors"), ("org/name", "deep/file.safetensors")]


@pytest.mark.parametrize("setting", ["/absent/d.safetensors", "absent/d.safetensors", "nonsense", "a\nb", "x" * 5000])
def test_setting_that_is_not_there(addresses, fingerprint, setting):
    with pytest.raises(ValueError, match=r"allowed: a file, or a hub id .*this is not a file that exists") as refused:
        find_dictionary(setting, NAME, fingerprint)
    assert str(refused.value).isprintable()


def test_a_folder_is_not_looked_up_on_the_hub(addresses, make_dictionary, fingerprint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my" / "dictionaries").mkdir(parents=True)
    with pytest.raises(ValueError, match="and this is a folder; it holds no dictionary"):
        find_dictionary("my/dictionaries", NAME, fingerprint)
    make_dictionary().save(tmp_path / "my" / "dictionaries" / "d.safetensors")
    with pytest.raises(ValueError, match=r"this is a folder; name the file in it, my/dictionaries/d\.safetensors"):
        find_dictionary("my/dictionaries", NAME, fingerprint)
    with pytest.raises(ValueError, match="this is not a file that exists"):
        find_dictionary("my/dictionaries/absent.safetensors", NAME, fingerprint)
    assert not addresses.calls


def test_setting_that_the_hub_does_not_have(addresses, fingerprint):
    with pytest.raises(ValueError, match=r"'org/name' is no file and could not be had .*ConnectionError"):
        find_dictionary("org/name", NAME, fingerprint)


def test_hub_is_not_asked_in_offline_mode(monkeypatch):
    import huggingface_hub

    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert f"the-project/some/resolve/{COMMIT}/dictionary.safetensors" in url and timeout < 10
            raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    entry = {"repository": "the-project/some", "revision": COMMIT}
    monkeypatch.setattr(search, "_listed_on_hub", lambda: {NAME: entry})
    path, words = search._from_hub(NAME)
    assert path is None and "OfflineModeIsEnabled: offline mode is enabled" in words


def test_the_revision_that_was_taken_is_logged(monkeypatch, caplog, tmp_path):
    import huggingface_hub

    def download(repo: str, file: str, revision: str | None, etag_timeout: float) -> str:
        return str(tmp_path / "models--me--mine" / "snapshots" / COMMIT / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with caplog.at_level("INFO", logger="vllm.lexico"):
        search._download("me/mine", "d.safetensors")
    assert f"d.safetensors of me/mine, revision {COMMIT}" in caplog.text


def test_what_the_package_lists_on_the_hub_is_pinned(root):
    for entry in json.loads((root / "dictionaries" / "hub.json").read_text()).values():
        assert set(entry) == {"repository", "revision"} and len(entry["revision"]) == 40
