"""Dictionary files: format, refusals, and where they are looked for."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_lexico.dictionary import file, search
from vllm_lexico.dictionary.file import (
    Dictionary,
    DictionaryInfo,
    ModelFingerprint,
    load_dictionary,
    pack_atoms,
    unit_atoms,
    unpack_atoms,
)
from vllm_lexico.dictionary.names import file_name, same_model
from vllm_lexico.dictionary.search import find_dictionary

FINGERPRINT = ModelFingerprint("llama", 2, 3, 16, 96, '{"rope_theta": 10000.0, "rope_type": "default"}')
NAME = "someone/some-model"


def make_dictionary(
    atom_bits: int = 4, name: str = NAME, fingerprint: ModelFingerprint = FINGERPRINT, shared: bool = True
) -> Dictionary:
    generator = torch.Generator().manual_seed(0)
    layers, heads, dim = fingerprint.num_layers, fingerprint.num_kv_heads, fingerprint.head_dim
    top, tensors = 2 ** (atom_bits - 1) - 1, {}
    for kv in ("key", "value"):
        size = (layers, 20, dim) if shared else (layers, heads, 20, dim)
        integers = torch.randint(-top, top + 1, size, generator=generator).to(torch.int8)
        integers[..., 0, :] = 0
        tensors[f"{kv}_atoms"] = pack_atoms(integers, atom_bits)
        tensors[f"{kv}_mean"] = torch.randn(layers, heads, dim, generator=generator)
        tensors[f"{kv}_stretch"] = 0.5 + torch.rand(layers, heads, dim, generator=generator)
        tensors[f"{kv}_levels"] = torch.linspace(-1, 1, 16).repeat(layers, 32, 1)
    errors = {"key": {"7": [0.25, 0.5]}}
    info = DictionaryInfo(name, fingerprint, 20, atom_bits, 5, "a test", 100, 300, errors, "test", 3)
    return Dictionary(info, tensors)


@pytest.fixture
def addresses(tmp_path, monkeypatch):
    """Folders that stand for the bundled ones and the user's cache, and an empty hub that counts calls."""
    calls: list[str] = []

    def no_hub(repo: str, file: str) -> bool:
        calls.append(f"{repo}/{file}")
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(search, "bundled_folder", lambda: tmp_path / "bundled")
    monkeypatch.setattr(search, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(search, "_answers", no_hub)
    monkeypatch.setattr(search, "_download", no_hub)
    return SimpleNamespace(bundled=tmp_path / "bundled", cache=tmp_path / "cache", calls=calls)


@pytest.mark.parametrize("atom_bits", [4, 8])
def test_round_trip(tmp_path, atom_bits):
    written = make_dictionary(atom_bits)
    written.save(tmp_path / "d.safetensors")
    read = load_dictionary(tmp_path / "d.safetensors")
    assert read.info == written.info
    assert all(torch.equal(read.tensors[name], written.tensors[name]) for name in written.tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.parametrize("atom_bits", [4, 8])
def test_packing_keeps_every_integer(atom_bits):
    integers = torch.arange(-(2 ** (atom_bits - 1)), 2 ** (atom_bits - 1)).to(torch.int8).view(2, -1)
    assert torch.equal(unpack_atoms(pack_atoms(integers, atom_bits), atom_bits), integers)


def test_packing_by_hand():
    assert pack_atoms(torch.tensor([1, -1, 7, -7], dtype=torch.int8), 4).tolist() == [0xF1, 0x97]
    torch.testing.assert_close(unit_atoms(torch.tensor([[0, 0], [3, -4]])), torch.tensor([[0, 0], [0.6, -0.8]]))


@pytest.mark.parametrize("atom_bits", [4, 8])
def test_codebook(atom_bits):
    made = make_dictionary(atom_bits)
    codebook = made.codebook(1, "value", 7, dtype=torch.bfloat16, heads=slice(1, 3))
    assert codebook.atoms.dtype == torch.bfloat16 and codebook.atoms.shape == (1, 20, 16)
    assert not codebook.atoms[0, 0].any()
    torch.testing.assert_close(codebook.atoms[0, 1:].float().norm(dim=1), torch.ones(19), atol=5e-3, rtol=0)
    assert torch.equal(codebook.mean, made.tensors["value_mean"][1, 1:3])
    assert torch.equal(codebook.stretch, made.tensors["value_stretch"][1, 1:3])
    assert codebook.levels.shape == (16,) and codebook.levels.dtype == torch.float32
    assert made.codebook(0, "key", 7).mean.shape == (3, 16)


@pytest.mark.parametrize("atom_bits", [4, 8])
def test_heads_may_have_atoms_of_their_own(atom_bits, tmp_path):
    made = make_dictionary(atom_bits, shared=False)
    share = torch.rand(2, 3, 20)
    share[..., 0] = 0
    usage = (share / share.sum((1, 2), keepdim=True)).half()
    Dictionary(made.info, made.tensors | {"key_usage": usage}).save(tmp_path / "d.safetensors")
    dictionary = load_dictionary(tmp_path / "d.safetensors")
    assert not dictionary.shared and make_dictionary(atom_bits).shared
    whole = dictionary.codebook(1, "key", 7)
    assert whole.atoms.shape == (3, 20, 16) and not whole.atoms[:, 0].any() and whole.head_stride == 20 * 16
    torch.testing.assert_close(whole.atoms, unit_atoms(unpack_atoms(made.tensors["key_atoms"][1], atom_bits)))
    rank = dictionary.codebook(1, "key", 7, heads=slice(1, 3))
    assert torch.equal(rank.atoms, whole.atoms[1:]) and torch.equal(rank.mean, whole.mean[1:])
    assert torch.equal(rank.head(0).atoms[0], whole.atoms[1])
    used = dictionary.usage("key")
    assert used.shape == (2, 1 + 3 * 19) and not used[:, 0].any()
    torch.testing.assert_close(used[1, 1:20], usage[1, 0, 1:].float())
    with pytest.raises(ValueError, match=r"key_atoms is .*, its metadata asks for"):
        Dictionary(
            made.info,
            made.tensors
            | {"value_atoms": made.tensors["value_atoms"][:, 0]}
            | {"key_atoms": made.tensors["key_atoms"][:, :2]},
        )


def test_cut_short(tmp_path):
    path = tmp_path / "d.safetensors"
    make_dictionary().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"d\.safetensors is damaged, cut short.*vllm-lexico train"):
        load_dictionary(path)


def test_damaged_byte(tmp_path):
    path = tmp_path / "d.safetensors"
    make_dictionary().save(path)
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match=r"is damaged: its checksum.*fetch it again"):
        load_dictionary(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": "7"}, r"format version '7', this release reads version '2'.*train the dictionary again"),
        ({"format": "weights"}, r"not a Lexico dictionary.*vllm-lexico train"),
        ({"fingerprint": "{"}, r"is damaged: its metadata"),
        ({"atoms": "999"}, r"tensor key_atoms is \(2, 20, 8\), its metadata asks for \(2, 999, 8\)"),
        ({"atom_bits": "5"}, r"atom_bits is 5, allowed are \(4, 8\)"),
    ],
)
def test_wrong_metadata(tmp_path, changes, words):
    path = tmp_path / "d.safetensors"
    made = make_dictionary()
    made.save(path)
    metadata = made.info.to_metadata() | {"sha256": file._checksum(made.tensors)} | changes
    save_file(load_file(path), path, metadata=metadata)
    with pytest.raises(ValueError, match=words):
        load_dictionary(path)


def test_not_a_dictionary(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="not a Lexico dictionary"):
        load_dictionary(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_dictionary(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match=r"there is no dictionary file .*absent"):
        load_dictionary(tmp_path / "absent")


def test_check_names_the_fields():
    model = replace(FINGERPRINT, num_layers=30, head_dim=64)
    with pytest.raises(ValueError) as refused:
        make_dictionary().check(model, "other/model")
    words = str(refused.value)
    assert "num_layers: 2 in the dictionary, 30 in the model; head_dim: 16 in the dictionary, 64 in the model" in words
    assert NAME in words and words.endswith("vllm-lexico train other/model")


def test_check_warns_of_another_name(caplog):
    with caplog.at_level("WARNING", logger="vllm.lexico"):
        make_dictionary().check(FINGERPRINT, NAME.upper())
        assert not caplog.records
        make_dictionary().check(FINGERPRINT, "other/model")
    assert f"trained on {NAME}, the model is other/model" in caplog.text


def test_fingerprint_is_the_same_from_old_and_new_configs():
    base = {
        "model_type": "qwen2", "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "hidden_size": 1536,
    }  # fmt: skip
    old = SimpleNamespace(**base, rope_theta=10000, rope_scaling=None)
    new = SimpleNamespace(**base, head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})
    assert ModelFingerprint.of(old) == ModelFingerprint.of(new)
    scaled = SimpleNamespace(**base, rope_theta=10000, rope_scaling={"type": "linear", "factor": 2})
    old_rope = '{"factor": 2.0, "rope_theta": 10000.0, "rope_type": "linear"}'
    new_rope = '{"rope_theta": 10000.0, "rope_type": "default"}'
    difference = f"rope: {old_rope} in the dictionary, {new_rope} in the model"
    assert ModelFingerprint.of(scaled).differences(ModelFingerprint.of(new)) == [difference]
    nested = SimpleNamespace(**base, rope_parameters={"full_attention": {"rope_theta": 1}, "sliding_attention": None})
    rope = {"full_attention": {"rope_theta": 1.0, "rope_type": "default"}}
    assert json.loads(ModelFingerprint.of(nested).rope) == rope


def test_names(tmp_path):
    assert file_name("Qwen/Qwen2.5-7B") == "Qwen_Qwen2.5-7B.safetensors"
    assert file_name(str(tmp_path / "my model")) == "my_model.safetensors"
    assert same_model("org/Model", "ORG/model") and not same_model("org/model", "other/model")
    assert same_model("org/model", "/data/models/Model")


def test_search_prefers_the_same_model_then_its_twins(addresses):
    def find() -> Path:
        return find_dictionary(None, NAME, FINGERPRINT)

    make_dictionary(name="a/twin").save(addresses.bundled / "a_twin.safetensors")
    make_dictionary(fingerprint=replace(FINGERPRINT, model_type="gemma")).save(addresses.cache / "wrong.safetensors")
    (addresses.cache / "broken.safetensors").write_text("broken")
    assert find() == addresses.bundled / "a_twin.safetensors"
    assert addresses.calls == ["vllm-lexico/someone_some-model/dictionary.safetensors"]
    make_dictionary().save(addresses.cache / "mine.safetensors")
    assert find() == addresses.cache / "mine.safetensors"
    make_dictionary().save(addresses.bundled / "some-model.safetensors")
    assert find() == addresses.bundled / "some-model.safetensors"
    assert len(addresses.calls) == 1


def test_search_takes_the_hub_before_a_twin(addresses, monkeypatch, tmp_path):
    make_dictionary(name="a/twin").save(addresses.bundled / "a_twin.safetensors")
    monkeypatch.setattr(search, "_answers", lambda repo, file: True)
    monkeypatch.setattr(search, "_download", lambda repo, file: tmp_path / repo / file)
    found = find_dictionary(None, NAME, FINGERPRINT)
    assert found == tmp_path / "vllm-lexico" / "someone_some-model" / "dictionary.safetensors"


def test_nothing_found_says_where_and_what_to_do(addresses, tmp_path):
    with pytest.raises(ValueError) as refused:
        find_dictionary(None, NAME, FINGERPRINT)
    words = str(refused.value)
    hub = "hub (vllm-lexico/someone_some-model: ConnectionError"
    for expected in (NAME, str(addresses.bundled), str(addresses.cache), hub):
        assert expected in words
    assert words.endswith(f"vllm-lexico train {NAME}")
    with pytest.raises(ValueError, match="not the Hugging Face hub"):
        find_dictionary(None, str(tmp_path / "local"), FINGERPRINT)


def test_setting(addresses, monkeypatch, tmp_path):
    path = tmp_path / "d.safetensors"
    path.touch()
    assert find_dictionary(str(path), NAME, FINGERPRINT) == path
    asked = []
    monkeypatch.setattr(search, "_download", lambda repo, file: asked.append((repo, file)) or path)
    assert find_dictionary("org/name", NAME, FINGERPRINT) == path
    assert find_dictionary("org/name/deep/file.safetensors", NAME, FINGERPRINT) == path
    assert asked == [("org/name", "dictionary.safetensors"), ("org/name", "deep/file.safetensors")]


@pytest.mark.parametrize("setting", ["/absent/d.safetensors", "absent/d.safetensors", "nonsense"])
def test_setting_that_is_not_there(addresses, setting):
    with pytest.raises(ValueError, match=r"is not a file that exists; give a path"):
        find_dictionary(setting, NAME, FINGERPRINT)


def test_setting_that_the_hub_does_not_have(addresses):
    with pytest.raises(ValueError, match=r"'org/name' is no file and could not be had .*ConnectionError"):
        find_dictionary("org/name", NAME, FINGERPRINT)


def test_hub_is_not_asked_in_offline_mode(monkeypatch, tmp_path):
    import huggingface_hub

    class Session:
        def head(self, url: str, timeout: float) -> None:
            assert "vllm-lexico/someone_some-model/resolve/main/dictionary.safetensors" in url and timeout < 10
            raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    path, words = search._from_hub(NAME)
    assert path is None and "OfflineModeIsEnabled: offline mode is enabled" in words
