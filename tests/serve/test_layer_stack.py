"""Which steps code all layers in one launch, and which layer of a step launches it."""

import types

import pytest
import torch
from lexico_kernels import CodeLayout
from lexico_kernels.testing import poisoned_cache

pytest.importorskip("vllm")
from vllm_lexico.serve.layer_parts import LayerParts
from vllm_lexico.serve.layer_stack import LayerFinder

LAYOUT = CodeLayout(64, 2, 3, 3, block_tokens=32)


class Layer:
    """An attention layer as `LayerFinder` sees it; without pages until it gets some."""

    def __init__(self):
        self.kv_cache, self.impl = torch.tensor([]), self

    def give_pages(self, layout=LAYOUT, dtype=torch.float16):
        self.cache = poisoned_cache(layout, 4, atoms=16, dtype=dtype)
        self.kv_cache = self.cache.code_pages

    def page_addresses(self, kv_cache):
        return kv_cache.data_ptr(), 0 if kv_cache.numel() == 0 else self.cache.tail_pages.data_ptr(), kv_cache.shape[0]

    def bind(self, layer, kv_cache, layout):
        assert layer is self and kv_cache is self.kv_cache
        return LayerParts.of(self.cache)


def finder_of(layers):
    names = [f"model.layers.{index}.attn" for index in range(len(layers))]
    config = types.SimpleNamespace(
        compilation_config=types.SimpleNamespace(static_forward_context=dict(zip(names, layers, strict=True))),
    )
    return LayerFinder(names, config)


def with_pages(count=3):
    layers = [Layer() for _ in range(count)]
    for layer in layers:
        layer.give_pages()
    return layers


def test_the_last_layer_of_a_run_launches():
    step = finder_of(with_pages()).of_step(LAYOUT)
    assert [step.count_stored() for _ in range(6)] == [
        False,
        False,
        True,
    ] * 2  # metadata may serve a warm-up and a capture


def test_pages_that_move_are_found_again():
    layers = with_pages()
    finder = finder_of(layers)
    first, again = finder.of_step(LAYOUT), finder.of_step(LAYOUT)
    assert again.stacks is first.stacks and again is not first
    for layer in layers:
        layer.give_pages()
    moved = finder.of_step(LAYOUT)
    (stack,) = moved.stacks
    assert [cache.code_pages.data_ptr() for cache in stack.caches] == [x.kv_cache.data_ptr() for x in layers]


def test_without_pages_or_alike_layers_each_codes_by_itself():
    layers = [Layer() for _ in range(2)]
    finder = finder_of(layers)
    assert finder.of_step(LAYOUT) is None
    layers[0].give_pages()
    layers[1].give_pages(dtype=torch.bfloat16)
    assert finder.of_step(LAYOUT) is None


def test_layers_of_each_sparsity_share_a_launch():
    layers = with_pages(5)
    for layer in layers[1], layers[4]:
        layer.give_pages(CodeLayout(64, 2, 4, 4, block_tokens=32, raw_tokens=LAYOUT.tail_tokens))
    step = finder_of(layers).of_step(LAYOUT)
    found = [[cache.code_pages.data_ptr() for cache in stack.caches] for stack in step.stacks]
    assert found == [[layers[at].kv_cache.data_ptr() for at in which] for which in ((0, 2, 3), (1, 4))]
    assert [step.count_stored() for _ in range(5)] == [False] * 4 + [True]


def test_a_step_that_missed_a_layer_is_noticed():
    finder = finder_of(with_pages())
    finder.of_step(LAYOUT).count_stored()
    with pytest.raises(AssertionError):
        finder.of_step(LAYOUT)
