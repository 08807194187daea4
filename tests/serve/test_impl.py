"""Pieces of the implementation that need no engine: heads of a rank, views of vLLM's pages, codebooks that stay put."""

import itertools
import types

import pytest
import torch
from lexico_kernels import CodeLayout
from lexico_kernels.testing import poisoned_cache

pytest.importorskip("vllm")
from vllm_lexico.dictionary.file import GAINS
from vllm_lexico.serve import impl
from vllm_lexico.serve.dense_attention import Packed, dense_attention, merge_into


@pytest.mark.parametrize(
    ("total", "size", "local", "firsts"),
    [(8, 1, 8, [0]), (8, 4, 2, [0, 2, 4, 6]), (2, 2, 1, [0, 1]), (2, 4, 1, [0, 0, 1, 1]), (1, 2, 1, [0, 0])],
)
def test_heads_of_a_rank(monkeypatch, total, size, local, firsts):
    monkeypatch.setattr(impl, "get_tensor_model_parallel_world_size", lambda: size)
    for rank, first in enumerate(firsts):
        monkeypatch.setattr(impl, "get_tensor_model_parallel_rank", lambda rank=rank: rank)
        assert impl._heads_of_rank(total, local) == slice(first, first + local)


@pytest.mark.parametrize("key_sparsity", [15, 11])  # 11: tail pages are padded
def test_views_of_a_page_cover_the_bytes_that_vllm_gave_it(key_sparsity):
    layout = CodeLayout(64, 3, key_sparsity, key_sparsity)
    stride = layout.page_bytes // 2 + 512  # in elements; other layers' pages lie between two of ours
    storage = torch.zeros(5 * stride, dtype=torch.bfloat16)
    shape = (5, 3, layout.block_tokens, layout.token_bytes // 2)
    codes = storage.as_strided(shape, (stride, layout.head_bytes // 2, layout.token_bytes // 2, 1))
    pages = impl._code_pages(codes)
    assert pages.shape == (5, layout.page_bytes) and pages.stride() == (2 * stride, 1)
    tail = storage.as_strided((5, 3, layout.tail_tokens, 128), (stride, layout.tail_tokens * 128, 128, 1))
    raw = impl._tail_pages(tail, layout)
    raw[2] = 1.0
    assert raw[2].numel() * 2 == layout.tail_page_bytes <= layout.page_bytes
    assert storage.count_nonzero() == raw[2].numel()
    assert storage[2 * stride : 2 * stride + raw[2].numel()].eq(1).all()


def test_more_pages_at_the_same_place_are_bound_again():
    """vLLM tries CUDA graphs with a few pages, frees them and allocates all."""
    layout = CodeLayout(64, 2, 3, 3, codec="exact")
    layer, own = torch.nn.Module(), object.__new__(impl.LexicoImpl)
    for kv, field in itertools.product(("key", "value"), impl.BOOK_FIELDS):
        shape = {"atoms": (1, 64), "levels": (16,)}.get(field, (2, 64))
        layer.register_buffer(f"lexico_{kv}_{field}", torch.zeros(shape))
    pages = torch.zeros(2, 5, 2, layout.block_tokens, 128, dtype=torch.float16)
    tail = types.SimpleNamespace(kv_cache=pages[1])
    layers = types.SimpleNamespace(static_forward_context={"tail": tail})
    own.vllm_config, own.tail_name = types.SimpleNamespace(compilation_config=layers), "tail"
    own._cache, own._bound_to = None, (0, 0, 0)
    few = own.bind(layer, pages[0, :2], layout)
    assert own.bind(layer, pages[0, :2], layout) is few and len(few.code_pages) == 2
    assert len(own.bind(layer, pages[0], layout).code_pages) == 5


def test_codebooks_keep_their_place_when_weights_are_loaded_again():
    layer = torch.nn.Module()
    impl._set_buffer(layer, "lexico_key_atoms", torch.ones(4, 8))
    before = layer.lexico_key_atoms.data_ptr()
    impl._set_buffer(layer, "lexico_key_atoms", torch.full((4, 8), 2.0))
    assert layer.lexico_key_atoms.data_ptr() == before and layer.lexico_key_atoms.eq(2).all()
    assert "lexico_key_atoms" in dict(layer.named_buffers()) and not layer.state_dict()


def test_codebooks_come_back_from_buffers_with_their_screen():
    """Sleep level 2 saves buffers and nothing else of a layer; the screen must be one where there is a screen."""
    cache = poisoned_cache(CodeLayout(64, 2, 3, 3), 1, atoms=16, dtype=torch.bfloat16)
    for book in (cache.key, cache.key.with_fp8_atoms()):
        layer = torch.nn.Module()
        impl._register(layer, "key", book)
        back = impl._book(layer, "key")
        names = [name for name, field in vars(book).items() if isinstance(field, torch.Tensor)]
        assert len(dict(layer.named_buffers())) == len(names) and (back.fp8_atoms is None) == (book.fp8_atoms is None)
        assert all(torch.equal(getattr(back, name).float(), getattr(book, name).float()) for name in names)
        assert back.gain == GAINS["key"]


def packed(*starts):
    return Packed(torch.tensor(starts, dtype=torch.int32), max(b - a for a, b in itertools.pairwise(starts)))


@pytest.mark.parametrize("cut", [1, 5, 300])
def test_attention_in_two_parts_is_attention(cut):
    torch.manual_seed(0)
    query, keys, values = torch.randn(7, 6, 64), torch.randn(310, 2, 64), torch.randn(310, 2, 64)
    all_rows, all_keys = packed(0, 7), packed(0, 310)
    whole, lse = dense_attention(query, keys, values, all_rows, all_keys, scale=0.125, causal=False)
    one = dense_attention(query, keys[:cut], values[:cut], all_rows, packed(0, cut), scale=0.125, causal=False)
    rest = packed(0, 310 - cut)
    two = dense_attention(query, keys[cut:], values[cut:], all_rows, rest, scale=0.125, causal=False)
    merged, merged_lse = one
    merge_into(merged, merged_lse, *two)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(merged_lse, lse)
    grouped = keys.repeat_interleave(3, 1), values.repeat_interleave(3, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), grouped[0].transpose(0, 1), grouped[1].transpose(0, 1), scale=0.125
    )
    torch.testing.assert_close(whole, expected.transpose(0, 1))


def test_causal_attention_is_aligned_to_the_last_key():
    query, keys = torch.randn(4, 2, 64), torch.randn(9, 2, 64)
    out, _ = dense_attention(query, keys, keys, packed(0, 4), packed(0, 9), scale=1.0, causal=True)
    last, _ = dense_attention(query[3:], keys, keys, packed(0, 1), packed(0, 9), scale=1.0, causal=False)
    torch.testing.assert_close(out[3:], last)
    first, _ = dense_attention(query[:1], keys[:6], keys[:6], packed(0, 1), packed(0, 6), scale=1.0, causal=False)
    torch.testing.assert_close(out[:1], first)
