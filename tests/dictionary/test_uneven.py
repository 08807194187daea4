"""Which KV heads get more atoms, from planted shares, in how many bytes."""

import types

import pytest
import torch
from lexico_kernels import CodeLayout

from vllm_lexico.dictionary.uneven import uneven_sparsities

SHARES = [
    [0.9, 0.1, 0.2, 0.8],  # two of four, not side by side
    [0.0, 0.0, 0.1, 0.0],
    [0.7, 0.7, 0.7, 0.6],  # all, before any of the next
    [0.3, 0.0, 0.5, 0.4],
]


@pytest.fixture
def planted():
    """What is read of a dictionary of four layers of four heads."""
    info = types.SimpleNamespace(model_name="planted", fingerprint=types.SimpleNamespace(layers=tuple(range(4))))
    return types.SimpleNamespace(info=info, tensors={"asked_shares": torch.tensor(SHARES)})


def chosen(found, high):
    return {index: [head for head, atoms in enumerate(own) if atoms == high] for index, own in found}


@pytest.mark.parametrize(
    ("mean", "low", "high", "expected"),
    [
        (7, 3, 15, {0: [0, 3], 1: [], 2: [0, 1, 2], 3: []}),
        (15, 11, 31, {0: [0, 3], 1: [], 2: [0], 3: []}),
        (7, 5, 9, {0: [0, 3], 1: [], 2: [0, 1, 2, 3], 3: [2, 3]}),
    ],
)
def test_heads_that_are_asked_most_get_more_atoms(planted, mean, low, high, expected):
    found = uneven_sparsities(planted, range(4), slice(0, 4), mean, low, high)
    assert chosen(found, high) == expected
    assert {atoms for _, own in found for atoms in own} <= {low, high}
    taken = sum(CodeLayout(128, 1, atoms, atoms).page_bytes for _, own in found for atoms in own)
    assert taken <= 16 * CodeLayout(128, 1, mean, mean).page_bytes


def test_bytes_for_no_head_at_all_are_refused(planted):
    with pytest.raises(
        ValueError, match=r"\[3, 31\] beside a sparsity of 4, which leaves none of a rank's 16 KV heads"
    ):
        uneven_sparsities(planted, range(4), slice(0, 4), 4, 3, 31)
    assert uneven_sparsities(planted, range(7, 9), slice(0, 4), 4, 3, 31) == ()  # a stage without coded layers


def test_no_head_with_fewer_is_asked_more(planted):
    shares = torch.rand((20, 8), generator=torch.Generator().manual_seed(0))
    shares *= torch.linspace(0.1, 1, 20)[:, None]  # the last layers are asked most
    planted.info.fingerprint.layers, planted.tensors["asked_shares"] = tuple(range(20)), shares
    high = torch.tensor([own for _, own in uneven_sparsities(planted, range(20), slice(0, 8), 7, 3, 15)]) == 15
    assert shares[high].min() > shares[~high].max()
    assert high.sum() == 160 * 4 // 12 and len(high.sum(1).unique()) > 3


@pytest.mark.parametrize("heads", [slice(0, 2), slice(2, 4), slice(1, 2)])
def test_a_tensor_parallel_rank_deals_out_the_bytes_of_its_own_heads(planted, heads):
    found = uneven_sparsities(planted, range(4), heads, 7, 3, 11)
    count = heads.stop - heads.start
    assert [len(own) for _, own in found] == [count] * 4
    assert sum(atoms + 1 for _, own in found for atoms in own) == 4 * count * 8
    alone = types.SimpleNamespace(info=planted.info, tensors={"asked_shares": torch.tensor(SHARES)[:, heads]})
    assert found == uneven_sparsities(alone, range(4), slice(0, count), 7, 3, 11)


def test_a_stage_deals_out_the_bytes_of_its_own_layers(planted):
    found = chosen(uneven_sparsities(planted, range(1, 9), slice(0, 4), 7, 3, 15), 15)
    assert found == {1: [], 2: [0, 1, 2, 3], 3: []}
    assert chosen(uneven_sparsities(planted, [3], slice(0, 4), 7, 3, 15), 15) == {3: [2]}


def test_a_dictionary_without_shares_is_refused(planted):
    del planted.tensors["asked_shares"]
    with pytest.raises(ValueError, match=r"does not say which heads are asked much.*vllm-lexico train"):
        uneven_sparsities(planted, range(4), slice(0, 4), 7, 3, 15)
