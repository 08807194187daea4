"""Pieces of the implementation that need no engine: views of vLLM's pages, and when they are made again."""

import types

import pytest
import torch
from lexico_kernels import KV, Codebook, CodeLayout

from vllm_lexico.config import LexicoConfig

pytest.importorskip("vllm")
from vllm_lexico.serve import impl, layer_parts
from vllm_lexico.serve.codebooks import LayerCodebooks
from vllm_lexico.serve.setup import LexicoSetup


@pytest.mark.parametrize("key_sparsity", [15, 11])  # 11: tail pages are padded
def test_views_of_a_page_cover_the_bytes_that_vllm_gave_it(key_sparsity):
    layout = CodeLayout(64, 3, key_sparsity, key_sparsity)
    stride = layout.page_bytes // 2 + 512  # in elements; other layers' pages lie between two of ours
    storage = torch.zeros(5 * stride, dtype=torch.bfloat16)
    shape = (5, 3, layout.block_tokens, layout.token_bytes // 2)
    codes = storage.as_strided(shape, (stride, layout.head_bytes // 2, layout.token_bytes // 2, 1))
    pages = layer_parts.code_pages(codes)
    assert pages.shape == (5, layout.page_bytes) and pages.stride() == (2 * stride, 1)
    tail = storage.as_strided((5, 3, layout.tail_tokens, 128), (stride, layout.tail_tokens * 128, 128, 1))
    raw = layer_parts.raw_pages(tail, layout)
    raw[2] = 1.0
    assert raw[2].numel() * 2 == layout.tail_page_bytes <= layout.page_bytes
    assert storage.count_nonzero() == raw[2].numel()
    assert storage[2 * stride : 2 * stride + raw[2].numel()].eq(1).all()


def test_more_pages_at_the_same_place_are_bound_again():
    """vLLM tries CUDA graphs with a few pages, frees them and allocates all."""
    layout = CodeLayout(64, 2, 3, 3, codec="exact")
    layer, own = torch.nn.Module(), object.__new__(impl.LexicoImpl)
    books = LayerCodebooks()
    books.load({kv: Codebook(*(torch.zeros(shape) for shape in ((1, 64), 16, (2, 64), (2, 64)))) for kv in KV})
    layer.add_module(impl.CODEBOOKS, books)
    pages = torch.zeros(2, 5, 2, layout.block_tokens, 128, dtype=torch.float16)
    tail = types.SimpleNamespace(kv_cache=pages[1])
    layers = types.SimpleNamespace(static_forward_context={"tail": tail})
    own.vllm_config, own.tail_name = types.SimpleNamespace(compilation_config=layers), "tail"
    own._cache, own._bound_to, own.num_heads, own.num_kv_heads = None, (0, 0, 0), 4, 2
    own.setup = LexicoSetup(LexicoConfig(codec="exact"), None, 0, 1)
    few = own.bind(layer, pages[0, :2], layout)
    assert own.bind(layer, pages[0, :2], layout) is few and len(few.whole.code_pages) == 2
    assert len(own.bind(layer, pages[0], layout).whole.code_pages) == 5
