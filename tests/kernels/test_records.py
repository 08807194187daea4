"""Where the bytes of records lie in pages."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lexico_kernels import KV, CodeLayout
from lexico_kernels.memory.records import load_records, scale_view, store_records
from lexico_kernels.testing import poisoned_cache

PLACES = {  # in a head of pages of 64 tokens: (slot, halfword): byte; halfword 0 is the scale, i + 1 entry i
    ("key", 15): {
        (0, 0): 0, (0, 1): 2, (0, 2): 128, (0, 3): 130, (0, 15): 898, (1, 0): 4, (1, 15): 902, (31, 0): 124,
        (31, 15): 1022, (32, 0): 1024, (33, 3): 1158, (63, 15): 2046,
    },
    ("value", 14): {
        (0, 0): 2048, (0, 13): 2818, (0, 14): 2944, (1, 0): 2052, (1, 14): 2946, (31, 13): 2942, (31, 14): 3006,
        (32, 0): 3008, (32, 14): 3904, (63, 14): 3966,
    },
}  # fmt: skip


def halfword_byte(layout, kv, slot, halfword):
    """Where a halfword lies in a head: word by word, and where they are odd in number the last in a row of its own."""
    record_bytes = layout.vector_bytes(kv)
    span_start = layout.kv_offset_bytes(kv) + slot // 32 * 32 * record_bytes
    if halfword < record_bytes // 4 * 2:
        return span_start + halfword // 2 * 128 + slot % 32 * 4 + halfword % 2 * 2
    return span_start + record_bytes // 4 * 128 + slot % 32 * 2


@pytest.mark.parametrize(("kv", "S"), PLACES)
def test_places_by_hand(kv, S):
    it = CodeLayout(128, 2, 15, 14, block_tokens=64)
    assert it.sparsity(kv) == S and it.head_bytes == 3968
    pages = torch.zeros(2, it.page_bytes + 64, dtype=torch.uint8)
    slots = torch.arange(64, 128)
    numbers = torch.arange(64 * 2 * (S + 1)).view(64, 2, S + 1).to(torch.int16)
    store_records(pages, it, kv, slots, numbers.view(torch.uint8))
    found = pages[1].view(torch.int16)
    for (slot, halfword), byte in PLACES[kv, S].items():
        assert halfword_byte(it, kv, slot, halfword) == byte
        for head in range(2):
            assert found[(head * 3968 + byte) // 2] == numbers[slot, head, halfword]


@given(st.integers(1, 31), st.integers(1, 31), st.sampled_from([32, 64, 128]), st.integers(1, 2))
@settings(max_examples=60, deadline=None)
def test_halfwords_cover_a_page_once(key_sparsity, value_sparsity, block_tokens, heads):
    it = CodeLayout(16, heads, key_sparsity, value_sparsity, block_tokens=block_tokens)
    pages = torch.zeros(3, it.page_bytes, dtype=torch.uint8)
    slots = block_tokens + torch.randperm(block_tokens)
    first, records = 0, {}
    for kv in KV:
        count = block_tokens * heads * it.vector_bytes(kv) // 2
        numbers = torch.arange(first, first + count).to(torch.int16).view(block_tokens, heads, -1)
        first, records[kv] = first + count, numbers.view(torch.uint8)
        store_records(pages, it, kv, slots, records[kv])
    assert torch.equal(pages[1].view(torch.int16).sort().values, torch.arange(first).to(torch.int16).sort().values)
    assert not pages[0].any() and not pages[2].any()
    for kv in KV:
        assert torch.equal(load_records(pages, it, kv, slots), records[kv])
        places = [halfword_byte(it, kv, slot, j) for slot in range(block_tokens) for j in range(it.sparsity(kv) + 1)]
        halfwords = pages[1, : it.head_bytes].view(torch.int16)[torch.tensor(places) // 2].view(block_tokens, -1)
        assert torch.equal(halfwords[slots - block_tokens], records[kv].view(torch.int16)[:, 0])


@pytest.mark.parametrize("codec", ["paper", "exact"])
@pytest.mark.parametrize("S", [1, 15, 31])
def test_other_records_cover_a_head_once(codec, S):
    it = CodeLayout(16, 1, S, S, codec, 32)
    pages, slots = torch.zeros(1, it.page_bytes, dtype=torch.uint8), torch.arange(32)
    for kv in KV:
        records = torch.ones(32, 1, it.vector_bytes(kv), dtype=torch.uint8)
        store_records(pages, it, kv, slots, records + load_records(pages, it, kv, slots))
    assert (pages[0, : it.head_bytes] == 1).all()


@pytest.mark.parametrize("codec", ["packed16", "paper"])
def test_scales(codec):
    it = CodeLayout(64, 2, 4, 5, codec, 64)
    pages, slots = torch.randint(256, (3, it.page_bytes + 8), dtype=torch.uint8), torch.arange(3 * 64)
    for kv in KV:
        scales = scale_view(pages, it, kv).permute(0, 2, 3, 1, 4).reshape(3 * 64, 2, 2)
        assert torch.equal(scales, load_records(pages, it, kv, slots)[..., :2])
        scale_view(pages, it, kv).copy_(torch.tensor([1, 2], dtype=torch.uint8))
        after = load_records(pages, it, kv, slots)
        assert (after[..., :2] == torch.tensor([1, 2], dtype=torch.uint8)).all()


def test_pages_that_words_cannot_be_loaded_from_are_refused():
    cache = poisoned_cache(CodeLayout(64, 2, 4, 5), 3, atoms=16, dtype=torch.float16)
    bytes_in_all = cache.code_pages.flatten()
    for first, stride in ((2, cache.layout.page_bytes), (0, cache.layout.page_bytes + 2)):
        pages = bytes_in_all.as_strided((2, cache.layout.page_bytes), (stride, 1), first)
        with pytest.raises(ValueError, match="allowed: multiples of 4"):
            dataclasses.replace(cache, code_pages=pages)
    dataclasses.replace(cache, code_pages=bytes_in_all.as_strided((2, cache.layout.page_bytes), (stride + 2, 1), 4))
