"""Dictionaries of models in which some layers are coded: their files, what is asked of them, and what is shown."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from vllm_lexico import cli
from vllm_lexico.dictionary import file, info
from vllm_lexico.dictionary.file import Dictionary, load_dictionary, read_info
from vllm_lexico.dictionary.fingerprint import ModelFingerprint, ranges
from vllm_lexico.dictionary.push import model_card

WINDOWED = ModelFingerprint("gemma3_text", 18, 1, 16, 64, '{"rope_theta": 1000000.0, "rope_type": "default"}', (5, 11))


@pytest.fixture
def some(make_dictionary):
    """Of a model of 18 layers, 2 of which are coded."""
    return make_dictionary(fingerprint=WINDOWED)


def test_the_file_holds_the_coded_layers_and_says_which(some, tmp_path):
    some.save(tmp_path / "d.safetensors")
    with safe_open(tmp_path / "d.safetensors", framework="pt") as stored:
        metadata, shape = stored.metadata(), stored.get_tensor("key_mean").shape
    assert metadata["layers"] == "[5, 11]" and metadata["format_version"] == "4" and shape == (2, 1, 16)
    assert "layers" not in json.loads(metadata["fingerprint"]) and json.loads(metadata["errors"])["key"]["7"] == [
        0.25,
        0.5,
    ]
    read = load_dictionary(tmp_path / "d.safetensors")
    assert read.info == some.info and read.info.fingerprint.layers == (5, 11)
    assert all(torch.equal(read.tensors[name], tensor) for name, tensor in some.tensors.items())


def test_a_file_of_all_layers_is_what_it_was(make_dictionary, root):
    """Whatever the fingerprint was made from: the list of layers is nowhere, and the version is that of before."""
    made = make_dictionary()
    listed = replace(made.info.fingerprint, some_layers=(0, 1))
    assert listed == made.info.fingerprint and listed.layers == (0, 1) and listed.all_layers
    metadata = replace(made.info, fingerprint=listed).to_metadata()
    assert metadata["format_version"] == "3" and "layers" not in metadata
    assert '"layers"' not in metadata["fingerprint"]
    bundled = root / "dictionaries" / "HuggingFaceTB_SmolLM2-135M-Instruct.safetensors"
    with safe_open(bundled, framework="pt") as stored:
        before = stored.metadata()
    after = load_dictionary(bundled).info.to_metadata()
    assert {name: before[name] for name in after if name != "format_version"} | {"format_version": "3"} == after


def test_codebooks_are_asked_for_by_the_models_number(some):
    for row, layer in enumerate((5, 11)):
        for kv in ("key", "value"):
            book = some.codebook(layer, kv, 7)
            assert torch.equal(book.mean, some.tensors[f"{kv}_mean"][row])
            assert torch.equal(book.stretch, some.tensors[f"{kv}_stretch"][row])
    for layer in (0, 1, 6, 17, 18, -1):
        with pytest.raises(
            ValueError, match=rf"a layer of .* was given as {layer}; allowed: 5, 11; .*vllm-lexico train"
        ):
            some.codebook(layer, "key", 7)


def test_faults_name_the_models_layer(some, tmp_path):
    some.tensors["value_mean"][1, 0, 3] = float("nan")
    with pytest.raises(ValueError, match="in layer 11, values, a mean is NaN"):
        some.save(tmp_path / "d.safetensors")


def test_tensors_of_another_number_of_layers_are_refused(some):
    with pytest.raises(ValueError, match=r"key_atoms is uint8 \(2, 20, 8\), its metadata asks for uint8 \(3, 20, 8\)"):
        Dictionary(replace(some.info, fingerprint=replace(WINDOWED, some_layers=(5, 11, 17)), errors={}), some.tensors)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ("[11, 5]", r"the coded layers was given as \[11, 5\]; allowed: ascending numbers from 0 to 17"),
        ("[5, 5]", r"was given as \[5, 5\]"),
        ("[5, 18]", r"was given as \[5, 18\]"),
        ("[-1, 5]", r"was given as \[-1, 5\]"),
        ("[true, 5]", r"was given as \[True, 5\]"),
        ("[5.0, 11]", r"was given as \[5.0, 11\]"),
        ('"511"', r"the coded layers was given as '511'; allowed: a list of numbers"),
        ("[]", r"was given as \[\]; allowed: a list of numbers"),
        ("{", "its metadata cannot be right"),
        ("[" * 100_000, "its metadata cannot be right"),
    ],
)
def test_wrong_lists_of_layers(some, tmp_path, layers, words):
    metadata = some.info.to_metadata() | {"layers": layers}
    path = tmp_path / "d.safetensors"
    save_file(some.tensors, path, metadata=metadata | {"sha256": file._checksum(some.tensors, metadata)})
    with pytest.raises(ValueError, match=words):
        read_info(path)


def test_a_release_that_knows_no_layers_says_so(some, tmp_path, monkeypatch):
    some.save(tmp_path / "d.safetensors")
    monkeypatch.setattr(info, "READ_VERSIONS", ("2", "3"))
    with pytest.raises(ValueError, match="format version '4', this release reads 2 or 3; install the release"):
        load_dictionary(tmp_path / "d.safetensors")


def test_other_coded_layers_do_not_fit(some):
    with pytest.raises(
        ValueError, match="does not fit a/b: coded layers: 5, 11 in the dictionary, 5, 11, 17 in the model"
    ):
        some.check(replace(WINDOWED, some_layers=(5, 11, 17)), "a/b")
    with pytest.raises(ValueError, match="coded layers: 5, 11 in the dictionary, all in the model"):
        some.check(replace(WINDOWED, some_layers=()), "a/b")
    some.check(WINDOWED, "someone/some-model")


def test_layers_in_words():
    assert ranges((3, 7, 11, 12)) == "3, 7, 11, 12" and ranges((0, 1, 2, 5, 8, 9, 10, 11)) == "0 to 2, 5, 8 to 11"
    assert ranges((4,)) == "4"


def test_inspect_and_the_card_name_the_models_layers(some, tmp_path, capsys):
    some.save(tmp_path / "d.safetensors")
    assert cli.main(["inspect", str(tmp_path / "d.safetensors"), "--no-plot"]) == 0
    shown = capsys.readouterr().out
    assert "model      gemma3_text, 18 layers of which 5, 11 are coded, 1 KV heads of 16" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["5", "0.2500"] in rows and ["11", "0.5000"] in rows
    card = model_card(some.info, "me/d")
    assert "for the values of each of the layers 5, 11," in card
    assert "gemma3_text, 18 layers of which 5, 11 are coded, 1 KV heads of 16, rotary" in " ".join(card.split())


def test_the_picture_has_the_models_layers(some, tmp_path, monkeypatch):
    axes = pytest.importorskip("matplotlib.axes")
    from vllm_lexico.dictionary.picture import plot_dictionary

    drawn, plot = [], axes.Axes.plot
    monkeypatch.setattr(
        axes.Axes, "plot", lambda self, x, *rest, **kw: drawn.append(list(x)) or plot(self, x, *rest, **kw)
    )
    plot_dictionary(some, tmp_path / "d.png")
    assert drawn == [[5, 11]]
