"""Dictionary files: what is written is read, what is damaged or another model's is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_lexico.dictionary import file
from vllm_lexico.dictionary.atoms import pack_atoms, unit_atoms, unpack_atoms
from vllm_lexico.dictionary.file import Dictionary, check_out, load_dictionary


def same(one: Dictionary, other: Dictionary) -> bool:
    return one.info == other.info and all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


@pytest.mark.parametrize("atom_bits", [4, 8])
def test_round_trip(tmp_path, atom_bits, make_dictionary):
    written = make_dictionary(atom_bits)
    written.save(tmp_path / "d.safetensors")
    assert same(written, load_dictionary(tmp_path / "d.safetensors"))
    assert [path.name for path in tmp_path.iterdir()] == ["d.safetensors"]


@pytest.mark.parametrize("atom_bits", [4, 8])
def test_codebook(atom_bits, make_dictionary):
    made = make_dictionary(atom_bits)
    codebook = made.codebook(1, "value", 7, dtype=torch.bfloat16, heads=(1, 2))
    assert codebook.atoms.dtype == torch.bfloat16 and codebook.atoms.shape == (1, 20, 16)
    assert not codebook.atoms[0, 0].any()
    torch.testing.assert_close(codebook.atoms[0, 1:].float().norm(dim=1), torch.ones(19), atol=5e-3, rtol=0)
    assert torch.equal(codebook.mean, made.tensors["value_mean"][1, 1:3])
    assert torch.equal(codebook.stretch, made.tensors["value_stretch"][1, 1:3])
    assert codebook.levels.shape == (16,) and codebook.levels.dtype == torch.float32
    assert made.codebook(0, "key", 7).mean.shape == (3, 16)


@pytest.mark.parametrize("atom_bits", [4, 8])
def test_heads_may_have_atoms_of_their_own(atom_bits, tmp_path, make_dictionary):
    made = make_dictionary(atom_bits, shared=False, usage=True)
    made.save(tmp_path / "d.safetensors")
    dictionary = load_dictionary(tmp_path / "d.safetensors")
    assert not dictionary.shared and make_dictionary(atom_bits).shared
    whole = dictionary.codebook(1, "key", 7)
    assert whole.atoms.shape == (3, 20, 16) and not whole.atoms[:, 0].any() and whole.head_stride == 20 * 16
    torch.testing.assert_close(whole.atoms, unit_atoms(unpack_atoms(made.tensors["key_atoms"][1], atom_bits)))
    rank = dictionary.codebook(1, "key", 7, heads=(1, 2))
    assert torch.equal(rank.atoms, whole.atoms[1:]) and torch.equal(rank.mean, whole.mean[1:])
    assert torch.equal(rank.head(0).atoms[0], whole.atoms[1])
    used = dictionary.usage("key")
    assert used is not None and used.shape == (2, 1 + 3 * 19) and not used[:, 0].any()
    torch.testing.assert_close(used[1, 1:20], made.tensors["key_usage"][1, 0, 1:].float())


@pytest.mark.parametrize("atom_bits", [4, 8])
def test_packing_keeps_every_integer(atom_bits):
    integers = torch.arange(-(2 ** (atom_bits - 1)), 2 ** (atom_bits - 1)).to(torch.int8).view(2, -1)
    assert torch.equal(unpack_atoms(pack_atoms(integers, atom_bits), atom_bits), integers)


def test_packing_by_hand():
    assert pack_atoms(torch.tensor([1, -1, 7, -7], dtype=torch.int8), 4).tolist() == [0xF1, 0x97]
    torch.testing.assert_close(unit_atoms(torch.tensor([[0, 0], [3, -4]])), torch.tensor([[0, 0], [0.6, -0.8]]))


def test_cut_short(tmp_path, make_dictionary):
    path = tmp_path / "d.safetensors"
    make_dictionary().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"d\.safetensors is damaged, cut short.*vllm-lexico train"):
        load_dictionary(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"key_mean":{"dtype":"F32"', b'"key_mean":{"dtype":"I32"'),  # a dtype of the same width
        (b'"seed":"3"', b'"seed":"4"'),
        (b"[2,32,16]", b"[2,16,32]"),  # a shape of the same size
        (b"rope_theta", b"rope_beta_"),
    ],
)
def test_the_checksum_covers_types_shapes_and_metadata(tmp_path, make_dictionary, old, new):
    path = tmp_path / "d.safetensors"
    make_dictionary().save(path)
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new, 1))
    with pytest.raises(ValueError, match="is damaged: its checksum does not match what it holds; fetch it again"):
        load_dictionary(path)


def test_the_checksum_covers_the_tensors_bytes(tmp_path, make_dictionary):
    path = tmp_path / "d.safetensors"
    make_dictionary().save(path)
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="is damaged: its checksum"):
        load_dictionary(path)


def as_version_2(dictionary: Dictionary, path) -> None:
    """Write a file as releases before format version 3 did."""
    metadata = dictionary.info.to_metadata() | {"format_version": "2"}
    sum_ = file._checksum(dictionary.tensors, metadata)
    save_file(dictionary.tensors, path, metadata=metadata | {"sha256": sum_})


def test_files_of_version_2_are_read_and_their_types_checked(tmp_path, make_dictionary, change_header):
    path, made = tmp_path / "d.safetensors", make_dictionary(8, usage=True)
    as_version_2(made, path)
    assert same(made, load_dictionary(path))
    for tensor, dtype, words in (
        ("key_mean", "I32", r"key_mean is int32 \(2, 3, 16\), its metadata asks for float32 \(2, 3, 16\)"),
        ("value_atoms", "U8", r"value_atoms is uint8 \(2, 20, 16\), its metadata asks for int8"),
        ("key_usage", "BF16", r"key_usage is bfloat16 \(2, 20\), its metadata asks for float16"),
    ):
        as_version_2(made, path)
        change_header(path, lambda header, t=tensor, d=dtype: header[t].update(dtype=d))
        with pytest.raises(ValueError, match=words):
            load_dictionary(path)


def test_bundled_dictionaries_are_read(root):
    paths = sorted((root / "dictionaries").glob("*.safetensors"))
    assert len(paths) == 3
    for path in paths:
        assert load_dictionary(path).tensors["key_levels"].isfinite().all()


def test_a_tensor_that_is_unknown_or_absent(make_dictionary):
    made = make_dictionary()
    with pytest.raises(ValueError, match="has a tensor 'extra', which its format does not know"):
        Dictionary(made.info, made.tensors | {"extra": torch.zeros(1)})
    absent = {name: tensor for name, tensor in made.tensors.items() if name != "value_mean"}
    with pytest.raises(ValueError, match=r"value_mean is absent, its metadata asks for float32 \(2, 3, 16\)"):
        Dictionary(made.info, absent)
    with pytest.raises(ValueError, match=r"key_atoms is .*, its metadata asks for"):
        Dictionary(make_dictionary(shared=False).info, {**made.tensors, "key_atoms": made.tensors["key_atoms"][:, :2]})


def test_not_a_dictionary(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match="not a Lexico dictionary"):
        load_dictionary(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no safetensors file"):
        load_dictionary(tmp_path / "text.safetensors")
    for absent, words in ((tmp_path / "absent", "there is no dictionary file"), (tmp_path, "is a folder and no dict")):
        with pytest.raises(ValueError, match=words):
            load_dictionary(absent)


def test_check_names_the_fields(make_dictionary, fingerprint, name):
    model = replace(fingerprint, num_layers=30, head_dim=64)
    with pytest.raises(ValueError) as refused:
        make_dictionary().check(model, "other/model")
    words = str(refused.value)
    assert "num_layers: 2 in the dictionary, 30 in the model; head_dim: 16 in the dictionary, 64 in the model" in words
    assert name in words and words.endswith("vllm-lexico train other/model")


def test_another_models_dictionary_is_said_in_one_line_and_no_warning(caplog, make_dictionary, fingerprint, name):
    with caplog.at_level("INFO", logger="vllm.lexico"):
        make_dictionary().check(fingerprint, name.upper())
        make_dictionary().check(fingerprint, f"/data/{name}")
        make_dictionary().check(fingerprint, "/cache/models--someone--some-model/snapshots/0123abc")
        assert not caplog.records
        make_dictionary().check(fingerprint, "other/model")
        make_dictionary().check(fingerprint, "/elsewhere/some-model")
    other, ending = [record.getMessage() for record in caplog.records]
    assert f"the dictionary of {name} serves other/model: shape and rotary embedding agree" in other
    assert other.endswith("(vllm-lexico train other/model)")
    assert "serves /elsewhere/some-model: their names end alike" in ending
    assert {record.levelname for record in caplog.records} == {"INFO"} and "\n" not in caplog.records[0].getMessage()


def test_a_checkpoint_of_one_run_does_not_serve_another_in_silence(
    tmp_path, monkeypatch, caplog, make_dictionary, fingerprint
):
    for run in ("run-A", "run-B"):
        (tmp_path / run / "checkpoint").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    made = make_dictionary(name="run-A/checkpoint")
    with caplog.at_level("INFO", logger="vllm.lexico"):
        made.check(fingerprint, str(tmp_path / "run-A" / "checkpoint"))
        assert not caplog.records
        made.check(fingerprint, "run-B/checkpoint")
    assert "the dictionary of run-A/checkpoint serves run-B/checkpoint: shape and rotary" in caplog.text
    monkeypatch.chdir(tmp_path / "run-A")  # from where the relative name means nothing
    caplog.clear()
    with caplog.at_level("INFO", logger="vllm.lexico"):
        made.check(fingerprint, str(tmp_path / "run-B" / "checkpoint"))
    assert "their names end alike" in caplog.text


def test_out_may_replace_the_same_models_dictionary_alone(tmp_path, make_dictionary, name):
    path = tmp_path / "new" / "d.safetensors"
    check_out(path, name)
    make_dictionary().save(path)
    check_out(path, name)
    with pytest.raises(ValueError, match=f"is the dictionary of {name} and would be replaced by that of a/b"):
        check_out(path, "a/b")
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"is there and would be replaced, but: .*not a Lexico dictionary"):
        check_out(path, name)


def test_out_has_to_be_a_file(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").touch()
    for given in ("", "/dev/null", "folder"):
        with pytest.raises(ValueError, match="is there and no file; give the name of a file"):
            check_out(Path(given), name)
    with pytest.raises(ValueError, match=r"allowed: any suffix but \.png"):
        check_out(Path("picture.png"), name)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    check_out(tmp_path / "model" / "d.lexico", name)
    with pytest.raises(ValueError, match=r"beside a model's config\.json.* as in .*model/d\.lexico$"):
        check_out(tmp_path / "model" / "d.safetensors", name)
    with pytest.raises(ValueError, match="text is no folder"):
        check_out(tmp_path / "text" / "d.safetensors", name)
    with pytest.raises(ValueError, match="the model's name was given as"):
        check_out(tmp_path / "d.safetensors", " ")
