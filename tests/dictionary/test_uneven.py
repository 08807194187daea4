"""Which layers get more atoms, from planted shares, in how many bytes."""

import types

import pytest
import torch
from lexico_kernels import CodeLayout

from vllm_lexico.dictionary.uneven import uneven_sparsities


@pytest.fixture
def planted():
    """What is read of a dictionary of six layers, of which 4 is asked most, then 1, then 5."""
    shares = torch.tensor([0.1, 0.6, 0.2, 0.0, 0.7, 0.4])[:, None].repeat(1, 2)
    shares[4] = torch.tensor([1.0, 0.3])  # the mean over heads counts
    info = types.SimpleNamespace(model_name="planted", fingerprint=types.SimpleNamespace(layers=tuple(range(6))))
    return types.SimpleNamespace(info=info, tensors={"asked_shares": shares})


@pytest.mark.parametrize(
    ("mean", "low", "high", "chosen"), [(7, 3, 15, {4, 1}), (7, 3, 31, set()), (7, 5, 9, {4, 1, 5}), (15, 11, 31, {4})]
)
def test_layers_that_are_asked_most_get_more_atoms(planted, mean, low, high, chosen):
    found = dict(uneven_sparsities(planted, range(6), mean, low, high))
    assert found == {index: high if index in chosen else low for index in range(6)}
    taken = sum(CodeLayout(128, 1, atoms, atoms).page_bytes for atoms in found.values())
    assert taken <= 6 * CodeLayout(128, 1, mean, mean).page_bytes
    one_more = CodeLayout(128, 1, high, high).page_bytes - CodeLayout(128, 1, low, low).page_bytes
    assert taken + one_more > 6 * CodeLayout(128, 1, mean, mean).page_bytes


def test_a_rank_deals_out_the_bytes_of_its_own_layers(planted):
    assert uneven_sparsities(planted, range(3), 7, 3, 15) == ((0, 3), (1, 15), (2, 3))
    assert uneven_sparsities(planted, range(3, 9), 7, 3, 15) == ((3, 3), (4, 15), (5, 3))


def test_a_dictionary_without_shares_is_refused(planted):
    del planted.tensors["asked_shares"]
    with pytest.raises(ValueError, match=r"does not say which layers are asked much.*vllm-lexico train"):
        uneven_sparsities(planted, range(6), 7, 3, 15)
