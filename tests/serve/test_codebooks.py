"""A layer's codebooks: which heads a rank takes, and buffers that stay where they are."""

from dataclasses import replace

import pytest
import torch
from lexico_kernels import Codebook, CodeLayout
from lexico_kernels.testing import poisoned_cache

pytest.importorskip("vllm")
from vllm_lexico.serve import codebooks
from vllm_lexico.serve.codebooks import TENSORS, LayerCodebooks


@pytest.mark.parametrize(
    ("total", "size", "local", "firsts"),
    [(8, 1, 8, [0]), (8, 4, 2, [0, 2, 4, 6]), (2, 2, 1, [0, 1]), (2, 4, 1, [0, 0, 1, 1]), (1, 2, 1, [0, 0])],
)
def test_heads_of_a_rank(monkeypatch, total, size, local, firsts):
    monkeypatch.setattr(codebooks, "get_tensor_model_parallel_world_size", lambda: size)
    for rank, first in enumerate(firsts):
        monkeypatch.setattr(codebooks, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        assert codebooks.heads_of_rank(total, local) == slice(first, first + local)


@pytest.fixture
def cache():
    return poisoned_cache(CodeLayout(64, 2, 3, 3), 1, atoms=16, dtype=torch.bfloat16)


def test_codebooks_keep_their_place_when_weights_are_loaded_again(cache):
    books, again = LayerCodebooks(), replace(cache.key, atoms=-cache.key.atoms)
    books.load({"key": cache.key})
    before = books.book("key").atoms.data_ptr()
    books.load({"key": again})
    assert books.book("key").atoms.data_ptr() == before != again.atoms.data_ptr()
    assert torch.equal(books.book("key").atoms, again.atoms)


@pytest.mark.parametrize("copies", [(), ("with_fp8_atoms",), ("with_fp8_atoms", "with_stream_atoms")])
def test_everything_a_codebook_holds_comes_back_from_buffers(copies):
    """Sleep level 2 saves a model's buffers and nothing else of a layer."""
    cache = poisoned_cache(CodeLayout(128, 2, 3, 3), 1, atoms=16, dtype=torch.bfloat16)
    books = {kv: cache.codebook(kv) for kv in ("key", "value")}
    for copy in copies:
        books = {kv: getattr(book, copy)() for kv, book in books.items()}
    layer = torch.nn.Module()
    layer.add_module("books", LayerCodebooks())
    layer.books.load(books)
    assert not layer.state_dict()  # no checkpoint has them
    tensors = [name for name in TENSORS if getattr(books["key"], name) is not None]
    assert len(tensors) == (4, 5, 8)[len(copies)]
    assert len(dict(layer.named_buffers())) == 2 * len(tensors)
    for kv, book in books.items():
        back = layer.books.book(kv)
        assert isinstance(back, Codebook) and back.gain == book.gain
        assert [name for name in TENSORS if getattr(back, name) is not None] == tensors
        assert all(torch.equal(getattr(back, name).float(), getattr(book, name).float()) for name in tensors)
