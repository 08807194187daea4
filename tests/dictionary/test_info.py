"""What a file says of itself: values that cannot be right are refused in one sentence, whatever their type."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file

from vllm_lexico.dictionary import file
from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint

DEEP = "[" * 100_000 + "]" * 100_000
BROKEN = [
    ({"format_version": "7"}, r"format version '7', this release reads 2, 3 or 4.*train the dictionary again"),
    ({"format": "weights"}, r"not a Lexico dictionary.*vllm-lexico train"),
    ({"atoms": "999"}, r"tensor key_atoms is uint8 \(2, 20, 8\), its metadata asks for uint8 \(2, 999, 8\)"),
    ({"atom_bits": "5"}, r"atom_bits was given as 5; allowed: 4 or 8"),
    ({"atom_bits": "4.0"}, r"atom_bits was given as 4.0; allowed: 4 or 8"),
    ({"atoms": "null"}, r"atoms was given as None; allowed: a whole number from 2 to 4096"),
    ({"atoms": "true"}, r"atoms was given as True"),
    ({"sparsity": "32"}, r"sparsity was given as 32"),
    ({"tokens_seen": '"many"'}, r"tokens_seen was given as 'many'"),
    ({"vectors_seen": "-1"}, r"vectors_seen was given as -1"),
    ({"seed": "1" * 5000}, r"its metadata cannot be right .*5000 digits"),
    ({"fingerprint": "{"}, r"its metadata cannot be right"),
    ({"fingerprint": "null"}, r"fingerprint was given as None; allowed: an object of model_type, num_layers"),
    ({"fingerprint": '{"num_layers": 2}'}, r"fingerprint was given as \{'num_layers': 2\}"),
    ({"fingerprint": DEEP}, r"its metadata cannot be right"),
    ({"errors": DEEP}, r"its metadata cannot be right"),
    ({"errors": "null"}, r"errors was given as None; allowed: a list of 2 numbers"),
    ({"errors": '{"key": {"7": [null, 1]}}'}, r"errors was given as \{'key'"),
    ({"errors": '{"key": {"7": [0.1]}}'}, r"errors was given as"),
    ({"errors": '{"key": {"7": [0.1, NaN]}}'}, r"errors was given as"),
    ({"errors": '{"key": {"7": [0.1, %s]}}' % ("1" * 400)}, r"errors was given as"),
    ({"errors": '{"query": {"7": [0.1, 0.1]}}'}, r"errors was given as"),
    ({"errors": '{"key": {"seven": [0.1, 0.1]}}'}, r"errors was given as"),
    ({"model_name": ""}, r"the model's name was given as ''"),
    ({"model_name": "a\nb"}, r"the model's name was given as 'a\\nb'; allowed: one line of printable text"),
    ({"model_name": "\x1b[31mred"}, r"the model's name was given as '\\x1b\[31mred'"),
]


def with_metadata(made, changes, path):
    metadata = made.info.to_metadata() | changes
    save_file(made.tensors, path, metadata=metadata | {"sha256": file._checksum(made.tensors, metadata)})


@pytest.mark.parametrize(("changes", "words"), BROKEN, ids=lambda value: str(value)[:40])
def test_wrong_metadata(tmp_path, make_dictionary, changes, words):
    path = tmp_path / "d.safetensors"
    with_metadata(make_dictionary(), changes, path)
    with pytest.raises(ValueError, match=words) as refused:
        load_dictionary(path)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 700


def test_metadata_that_is_absent(tmp_path, make_dictionary):
    path, made = tmp_path / "d.safetensors", make_dictionary()
    metadata = made.info.to_metadata()
    del metadata["atoms"], metadata["seed"]
    save_file(made.tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="is damaged: its metadata lacks atoms, seed; fetch it again"):
        load_dictionary(path)
    save_file(load_file(path), path)
    with pytest.raises(ValueError, match="not a Lexico dictionary"):
        load_dictionary(path)


def test_a_model_that_no_dictionary_fits():
    config = SimpleNamespace(model_type="other", num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=[2, 4],
                             hidden_size=64, head_dim=16)  # fmt: skip
    with pytest.raises(ValueError, match=r"the model's num_kv_heads was given as \[2, 4\]; allowed: a whole number"):
        ModelFingerprint.of(config)


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


def test_errors_are_checked_when_made(make_dictionary):
    with pytest.raises(ValueError, match="errors was given as"):
        replace(make_dictionary().info, errors={"key": {"7": [0.25]}})
