"""Layers of other sparsities in the blocks of equal pages that vLLM made: none writes where another reads."""

import types

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig

pytest.importorskip("vllm")
from vllm_lexico.serve import refusals
from vllm_lexico.serve.uneven_pages import PagesOfLayer, own_pages

BLOCKS, MEAN, ROOM = 3, 64, 4 * 64 + 32  # bytes; other layers' pages may follow in a block
OWN = {7: 32, 2: 128, 5: 32, 9: 64}  # by layer, in the order in which they lie


def layers_in(memory, own=OWN):
    blocks = memory.view(BLOCKS, ROOM)
    return {index: PagesOfLayer(blocks[:, at * MEAN : (at + 1) * MEAN], own[index]) for at, index in enumerate(own)}


def test_pages_lie_side_by_side_and_apart():
    memory = torch.zeros(BLOCKS * ROOM, dtype=torch.uint8)
    layers = layers_in(memory)
    for index in (9, 2, 7, 5):
        pages = own_pages(layers[index].given, layers, index)
        assert pages.shape == (BLOCKS, OWN[index])
        assert (pages == 0).all()
        pages.fill_(index)
    expected = torch.tensor([index for index, size in OWN.items() for _ in range(size)], dtype=torch.uint8)
    blocks = memory.view(BLOCKS, ROOM)
    assert all(torch.equal(block[: len(expected)], expected) and not block[len(expected) :].any() for block in blocks)


def test_what_would_overlap_is_refused():
    memory = torch.zeros(BLOCKS * ROOM, dtype=torch.uint8)
    too_large = layers_in(memory, OWN | {9: 65})
    elsewhere = layers_in(memory)
    elsewhere[9] = PagesOfLayer(torch.zeros(BLOCKS, ROOM, dtype=torch.uint8)[:, :MEAN], 64)
    gap = layers_in(memory)
    del gap[5]
    for layers in (too_large, elsewhere, gap):
        with pytest.raises(ValueError, match="written over one another"):
            own_pages(layers[2].given, layers, 2)


@pytest.mark.parametrize(
    ("hybrid", "text", "drafts", "words"),
    [
        (False, LlamaConfig(), None, None),
        (False, LlamaConfig(), "ngram", None),
        (True, LlamaConfig(), None, "layers with states"),
        (False, Gemma3TextConfig(num_hidden_layers=6), None, "layers with windows"),
        (False, LlamaConfig(), "eagle3", "drafts by a model"),
    ],
)
def test_where_a_block_has_other_layers_it_is_refused(hybrid, text, drafts, words):
    speculative = None if drafts is None else types.SimpleNamespace(method=drafts)
    model = types.SimpleNamespace(is_hybrid=hybrid, hf_text_config=text)
    found = refusals.uneven_refusals(types.SimpleNamespace(model_config=model, speculative_config=speculative))
    assert (found == []) if words is None else (words in found[0] and "leave it out" in found[0])
