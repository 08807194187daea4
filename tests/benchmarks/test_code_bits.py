"""Hashes that show whether a change moves a bit: the same for the same seeds, another for other bits."""

import pytest
import torch


@pytest.fixture(scope="module")
def code_bits(import_benchmark):
    return import_benchmark("code_bits")


def test_lines_are_the_same_every_time_and_no_two_results_are(code_bits):
    lines = [*code_bits.twin_lines(tokens=2)]
    assert lines == [*code_bits.twin_lines(tokens=2)]
    names, digests = zip(*lines, strict=True)
    assert len(set(names)) == len(set(digests)) == len(lines) == 18


def test_a_digest_knows_every_bit_shape_and_dtype(code_bits):
    zeros = torch.zeros(2, 3)
    others = [zeros.view(3, 2), zeros.int(), -zeros, zeros + torch.tensor([0, 0, 1e-45])]
    assert len({code_bits.digest(tensor) for tensor in [zeros, *others]}) == 5
    assert code_bits.digest(zeros) == code_bits.digest(torch.zeros(2, 6)[:, ::2])
