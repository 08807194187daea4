"""Numbers that cannot be a dictionary's are refused when a file is written and when it is read."""

import pytest
import torch
from safetensors.torch import save_file

from vllm_lexico.dictionary import file
from vllm_lexico.dictionary.atoms import has_lowest, pack_atoms
from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.tensors import check_numbers

FAULTS = [
    ("mean", (1, 2, 3), float("nan"), "a mean is NaN or infinite"),
    ("mean", (1, 2, 3), float("-inf"), "a mean is NaN or infinite"),
    ("stretch", (1, 2, 3), 0.0, "a stretch is not a finite number above 0"),
    ("stretch", (1, 2, 3), -1.0, "a stretch is not a finite number above 0"),
    ("stretch", (1, 2, 3), float("nan"), "a stretch is not a finite number above 0"),
    ("stretch", (1, 2, 3), float("inf"), "a stretch is not a finite number above 0"),
    ("stretch", (1, 2, 3), 1e-40, "a stretch is not a finite number above 0"),
    ("levels", (1, 15, 15), 1.01, "a level is outside -1 to 1"),
    ("levels", (1, 15, 0), float("nan"), "a level is outside -1 to 1"),
    ("levels", (1, 15, 3), 0.9, "levels do not ascend"),
    ("usage", (1, 4), -0.01, "a share of use is outside 0 to 1"),
    ("usage", (1, 4), float("nan"), "a share of use is outside 0 to 1"),
    ("usage", (1, 4), 0.9, "shares of use add up to more than 1"),
    ("usage", (1, 0), 0.01, "the null atom has a share of use"),
]


def write_unchecked(dictionary: Dictionary, path) -> None:
    """A file with a right checksum, whatever its numbers."""
    metadata = dictionary.info.to_metadata()
    save_file(dictionary.tensors, path, metadata=metadata | {"sha256": file._checksum(dictionary.tensors, metadata)})


@pytest.mark.parametrize("kv", ["key", "value"])
@pytest.mark.parametrize(("kind", "at", "value", "words"), FAULTS)
def test_rows(make_dictionary, tmp_path, kv, kind, at, value, words):
    made = make_dictionary(usage=True)
    made.tensors[f"{kv}_{kind}"][at] = value
    with pytest.raises(ValueError, match=f"cannot be right: in layer 1, {kv}s, {words}; fetch it again"):
        made.save(tmp_path / "d.safetensors")
    assert not any(tmp_path.iterdir())
    write_unchecked(made, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=rf"d\.safetensors: .*in layer 1, {kv}s, {words}"):
        load_dictionary(tmp_path / "d.safetensors")


@pytest.mark.parametrize("number", [-0.01, 1.01, float("nan"), float("inf")])
def test_shares_that_cannot_be(make_dictionary, tmp_path, number):
    made = make_dictionary(asked=True)
    made.tensors["asked_shares"][1, 2] = number
    words = "in layer 1, a share of tokens that are asked for is outside 0 to 1; fetch it again"
    with pytest.raises(ValueError, match=f"cannot be right: {words}"):
        made.save(tmp_path / "d.safetensors")
    write_unchecked(made, tmp_path / "d.safetensors")
    with pytest.raises(ValueError, match=rf"d\.safetensors: .*{words}"):
        load_dictionary(tmp_path / "d.safetensors")


def test_shares_of_another_type_or_shape(make_dictionary):
    made = make_dictionary()
    for bad in (torch.zeros(2, 3, dtype=torch.float16), torch.zeros(2), torch.zeros(3, 2), torch.zeros(2, 3, 16)):
        with pytest.raises(ValueError, match=r"tensor asked_shares is float.*asks for float32 \(2, 3\); fetch"):
            Dictionary(made.info, made.tensors | {"asked_shares": bad})


def test_shares_are_kept_and_old_files_have_none(make_dictionary, tmp_path):
    made = make_dictionary(asked=True)
    made.tensors["asked_shares"][0, :2] = torch.tensor([0.0, 1.0])  # the edges
    made.save(tmp_path / "d.safetensors")
    assert torch.equal(
        load_dictionary(tmp_path / "d.safetensors").tensors["asked_shares"], made.tensors["asked_shares"]
    )
    make_dictionary().save(tmp_path / "old.safetensors")
    assert "asked_shares" not in load_dictionary(tmp_path / "old.safetensors").tensors


@pytest.mark.parametrize(("atom_bits", "lowest"), [(4, -8), (8, -128)])
@pytest.mark.parametrize("shared", [True, False])
def test_atoms(make_dictionary, tmp_path, atom_bits, lowest, shared):
    for row, number, words in ((7, lowest, f"an atom has the number {lowest}"), (0, 1, "the null atom")):
        made = make_dictionary(atom_bits, shared=shared)
        stored = made.tensors["value_atoms"][1]
        packed = pack_atoms(torch.tensor([number, 2], dtype=torch.int8), atom_bits)
        stored[..., row, 3 : 3 + len(packed)] = packed
        with pytest.raises(ValueError, match=f"in layer 1, values, {words}"):
            made.save(tmp_path / "d.safetensors")
        write_unchecked(made, tmp_path / "d.safetensors")
        with pytest.raises(ValueError, match=f"in layer 1, values, {words}"):
            load_dictionary(tmp_path / "d.safetensors")


def test_layers_of_a_part_are_named_by_their_own_numbers(make_dictionary):
    made = make_dictionary()
    made.tensors["key_mean"][1] = float("nan")
    with pytest.raises(ValueError, match="in layer 13, keys"):
        check_numbers(made.tensors, 4, (7, 13))


def test_the_lowest_integer_is_found_wherever_it_stands():
    for size in (1, 7, 8, 9, 24):
        for at in range(size):
            for half in (0x08, 0x80):
                halves = torch.full((size,), 0x77, dtype=torch.uint8)
                assert not has_lowest(halves, 4)
                halves[at] = halves[at] & (0xF0 if half == 0x08 else 0x0F) | half
                assert has_lowest(halves, 4)
    every = torch.arange(256).to(torch.uint8)
    for number in range(256):
        assert has_lowest(every[number : number + 1], 4) == (number & 15 == 8 or number >> 4 == 8)
    assert has_lowest(torch.tensor([[127, -128]], dtype=torch.int8), 8)
    assert not has_lowest(torch.tensor([[127, -127]], dtype=torch.int8), 8)


def test_what_is_right_at_the_edge(make_dictionary):
    made = make_dictionary(usage=True)
    made.tensors["key_levels"][:, 15] = 0.5  # equal levels
    made.tensors["key_levels"][:, 14, 3] = made.tensors["key_levels"][:, 14, 2] - 2.0**-21  # interpolated in float32
    made.tensors["key_atoms"][:, 5] = 0  # of a head with nothing to code
    made.tensors["key_usage"][:] = 0
    check_numbers(made.tensors, 4, (0, 1))
