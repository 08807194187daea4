"""What dictionary files lose: against codes made and read by hand, with one ruler for all files."""

import sys

import pytest
import torch
from lexico_kernels import reference
from lexico_kernels.memory.layout import KV, CodeLayout

from vllm_lexico.dictionary.file import Dictionary, load_dictionary

pytestmark = pytest.mark.usefixtures("one_thread")
SPARSITY = 7


@pytest.fixture(scope="module")
def losses(import_benchmark):
    import_benchmark("dictionary_texts")
    return sys.modules["bench.file_losses"]


@pytest.fixture(scope="module")
def dictionary(load_benchmark, write_letters_model, tmp_path_factory) -> Dictionary:
    model = write_letters_model(tmp_path_factory.mktemp("tiny"), layers=2, kv_heads=2, head_dim=64)
    return load_dictionary(load_benchmark("bench/shapes").write_random_dictionary(model, atoms=64))


def vectors() -> torch.Tensor:
    return torch.randn(2, 2, 50, 2, 64, generator=torch.Generator().manual_seed(0)) + 1


def by_hand(dictionary: Dictionary, test: torch.Tensor, unit: float) -> dict[str, float]:
    """As codes are stored, without the gain, which is for attention and not for the error."""
    layout, lost = CodeLayout(64, 2, SPARSITY, SPARSITY), dict.fromkeys(KV, 0.0)
    for layer in range(2):
        for at, kv in enumerate(KV):
            raw = test[layer, at]
            book = dictionary.codebook(layer, kv, SPARSITY)
            book = type(book)(**{**vars(book), "gain": 0.0})
            records = reference.encode_heads(raw, book, layout, kv)
            error = (raw - reference.decode_heads(records, book, layout, kv, torch.float32)) / unit
            lost[kv] += float(error.square().sum() / ((raw - raw.mean(0)) / unit).square().sum()) / 2
    return lost


def stretched(dictionary: Dictionary, by: float) -> Dictionary:
    tensors = {name: tensor * by if "stretch" in name else tensor for name, tensor in dictionary.tensors.items()}
    return Dictionary(dictionary.info, tensors)


def test_it_is_what_stored_codes_lose(losses, dictionary):
    test = vectors()
    found = losses.file_losses(dictionary, dictionary, test, SPARSITY)
    assert found == pytest.approx(by_hand(dictionary, test, 1.0), rel=1e-3)
    assert min(found.values()) > 0.05


def test_all_files_are_measured_with_the_first_ones_ruler(losses, dictionary):
    rows = losses.loss_rows({"a": dictionary, "b": stretched(dictionary, 2.0)}, {"text": vectors()}, (SPARSITY,))
    assert [(row["file"], row["part"]) for row in rows] == [("a", "key"), ("a", "value"), ("b", "key"), ("b", "value")]
    # A stretch of all numbers alike changes no code's direction: only the ruler could tell the files apart.
    assert [row["ratio"] for row in rows] == pytest.approx([1, 1, 1, 1], rel=1e-3)


def test_another_shape_is_refused(losses, dictionary, write_letters_model, load_benchmark, tmp_path):
    other = write_letters_model(tmp_path / "other", layers=2, kv_heads=1, head_dim=64)
    other = load_dictionary(load_benchmark("bench/shapes").write_random_dictionary(other, atoms=64))
    with pytest.raises(ValueError, match="b and a are of different models"):
        losses.loss_rows({"a": dictionary, "b": other}, {"text": vectors()}, (SPARSITY,))
