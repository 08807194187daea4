"""Files changed at random, 3,000 of them: each is loaded right, or refused in one sentence."""

import contextlib
import io
import json
import struct
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from vllm_lexico.cli import inspect
from vllm_lexico.dictionary import file
from vllm_lexico.dictionary.atoms import unpack_atoms
from vllm_lexico.dictionary.file import Dictionary, load_dictionary, read_info
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.info import DictionaryInfo
from vllm_lexico.dictionary.push import model_card

SMALL = ModelFingerprint("llama", 2, 2, 8, 16, "{}")
WHICH = st.integers(0, 3)  # of `files`
often = settings(
    max_examples=1000,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def files(make_dictionary):
    """(dictionary, content of its file): 4 bits in versions 2 and 3, 8 bits in both."""
    made = []
    for bits in (4, 8):
        dictionary = make_dictionary(bits, fingerprint=SMALL, shared=bits == 4, usage=bits == 8)
        metadata = dictionary.info.to_metadata()
        made += [(dictionary, sealed(dictionary.tensors, metadata | {"format_version": v})) for v in ("2", "3")]
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "d.safetensors"


def sealed(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    """A file with a right checksum, whatever it says."""
    return save(tensors, metadata | {"sha256": file._checksum(tensors, metadata)})


def read(path) -> Dictionary | None:
    """The dictionary, shown in every way that it can be shown, or None where it is refused in one sentence."""
    try:
        dictionary = load_dictionary(path)
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000 and error.__class__ is ValueError, error
        return None
    assert read_info(path) == dictionary.info
    with contextlib.redirect_stdout(io.StringIO()):
        inspect._print_facts(dictionary)
        inspect._print_layers(dictionary)
    model_card(dictionary.info, "me/shared").encode()
    return dictionary


def is_right(dictionary: Dictionary) -> bool:
    """The rules for numbers once more, in the plainest words."""
    for kv in ("key", "value"):
        part = {
            name.removeprefix(f"{kv}_"): tensor for name, tensor in dictionary.tensors.items() if name.startswith(kv)
        }
        integers = unpack_atoms(part["atoms"], dictionary.info.atom_bits).int()
        top = 2 ** (dictionary.info.atom_bits - 1) - 1
        right = integers.abs().max() <= top and not integers[..., 0, :].any() and part["mean"].isfinite().all()
        right = right and ((part["stretch"] >= 2.0**-126) & part["stretch"].isfinite()).all()
        right = right and (part["levels"].abs() <= 1).all() and (part["levels"].diff(dim=-1) >= -(2.0**-20)).all()
        if "usage" in part:
            shares = part["usage"].float().flatten(1)
            right = right and (shares >= 0).all() and (shares.sum(1) <= 1 + 2.0**-6).all()
            right = right and not part["usage"][..., 0].any()
        if not right:
            return False
    return True


def parts(content: bytes) -> tuple[dict, bytes]:
    """The header and the rest of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def whole(header: dict, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


PLACES = st.one_of(st.integers(0, 2000), st.integers(0, 12000))  # in the header, or anywhere
CHANGES = st.lists(st.tuples(PLACES, st.sampled_from("=+-|"), st.integers(0, 255)), min_size=1, max_size=3)


@often
@given(which=WHICH, changes=CHANGES)
def test_bytes(files, path, which, changes):
    """Bytes changed, put in, taken out or cut off."""
    dictionary, content = files[which]
    changed = bytearray(content)
    for at, what, byte in changes:
        if what == "=":
            changed[at : at + 1] = bytes([byte])
        elif what == "+":
            changed[at:at] = bytes([byte])
        else:
            del changed[at : at + 1 if what == "-" else None]
    path.write_bytes(bytes(changed))
    loaded = read(path)
    if loaded is not None:
        assert loaded.tensors.keys() == dictionary.tensors.keys() and is_right(loaded)
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in dictionary.tensors.items())
        assert loaded.info == dictionary.info or which in (0, 2)  # version 2 has metadata without a checksum


def nested(values: list) -> list[str]:
    """JSON of these, alone, in lists, as errors, and as fields of a fingerprint."""
    errors = [{kv: {of: [value, value]}} for value in values for kv in ("key", "query") for of in ("7", "32", "x")]
    shapes = [vars(SMALL) | {name: value} for value in values for name in vars(SMALL)]
    return [json.dumps(value) for value in [*values, *errors, *shapes, *([value, value] for value in values)]]


SCALARS = [None, True, 0, 1, 2, -1, 7, 20, 31, 2**31, 2**63, 10**400, 0.5, -0.5, 1e300, float("nan"), float("inf")]
STRANGE = ["[" * 10_000, "9" * 5000, "", " ", "a\nb", "\x1b[31m", '"\\ud800"', "2", "3", '{"model_type": null}']
JSON = nested([*SCALARS, "", "x", "\u0663", "a\nb", "\ud800", [], {}, [[]], {"7": []}])
WORDS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)
NUMBERS = st.one_of(st.integers(-(10**5), 10**25), st.floats()).map(json.dumps)
VALUES = st.one_of(st.sampled_from(JSON), st.sampled_from(STRANGE), NUMBERS, WORDS)
FIELDS = st.sampled_from(("format", "format_version", *(field.name for field in fields(DictionaryInfo))))


@often
@given(which=WHICH, field=FIELDS, value=VALUES)
def test_metadata(files, path, which, field, value):
    """Metadata of any type, under a right checksum."""
    dictionary, content = files[which]
    metadata = parts(content)[0]["__metadata__"] | {field: value}
    del metadata["sha256"]
    path.write_bytes(sealed(dictionary.tensors, metadata))
    loaded = read(path)
    if loaded is not None:
        assert is_right(loaded)
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in dictionary.tensors.items())


KINDS = st.sampled_from(("F32", "I32", "U32", "F16", "BF16", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F64", "F4", "C64"))
SIZES = st.lists(st.sampled_from((0, 1, 2, 4, 8, 16, 20, 32, 2**40)), max_size=4)


@settings(often, max_examples=500)
@given(
    which=WHICH,
    at=st.integers(0, 9),
    changes=st.fixed_dictionaries({}, optional={"dtype": KINDS, "shape": SIZES, "data_offsets": SIZES}),
)
def test_types(files, path, which, at, changes):
    """Dtypes, shapes and places of tensors under the checksum of the right ones."""
    dictionary, content = files[which]
    header, rest = parts(content)
    names = sorted(dictionary.tensors)
    header[names[at % len(names)]] |= changes
    path.write_bytes(whole(header, rest))
    loaded = read(path)
    assert (loaded is None) == (header != parts(content)[0])


SPECIAL = st.sampled_from((float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 1e-40, 0.5))
FLOATS = st.one_of(st.floats(width=16), st.floats(-1, 1, width=16), st.floats(width=32), SPECIAL)


@settings(often, max_examples=500)
@given(
    bits=st.sampled_from((1, 3)),
    tensor=st.integers(0, 9),
    at=st.integers(0, 10**4),
    number=FLOATS,
    byte=st.integers(0, 255),
)
def test_numbers(files, path, bits, tensor, at, number, byte):
    """A number put anywhere under a right checksum: accepted exactly where it is right, and never written if not."""
    dictionary, _ = files[bits]
    name = sorted(dictionary.tensors)[tensor % len(dictionary.tensors)]
    changed = dictionary.tensors[name].clone()
    flat = changed.view(-1) if changed.is_floating_point() else changed.view(torch.uint8).view(-1)
    flat[at % flat.numel()] = number if changed.is_floating_point() else byte
    made = Dictionary(dictionary.info, dictionary.tensors | {name: changed})
    path.write_bytes(sealed(made.tensors, made.info.to_metadata()))
    loaded = read(path)
    assert (loaded is not None) == is_right(made)
    if loaded is None:
        path.unlink()
        with pytest.raises(ValueError, match=r"cannot be right: in layer [01], (key|value)s, "):
            made.save(path)
        assert not path.exists()
