"""A layer in parts codes, decodes and rebuilds as layers of single heads do, each with its own sparsity."""

from dataclasses import replace

import pytest
import torch
from lexico_kernels import CodeLayout, RequestTables, ops
from lexico_kernels.testing import random_codebook

pytest.importorskip("vllm")
from vllm_lexico.serve.layer_parts import HeadOrder, LayerParts, stacked

HEADS, GROUP, P, PAGES, TOKENS = 4, 3, 64, 64, 150
MEAN, PART_SPARSITY, ORDER = 7, (3, 11), (1, 3, 0, 2)  # heads 1 and 3 have 3 atoms, the others 11
SCALE = 0.2


class Both:
    """The same tokens in a layer of two parts and in four layers of one head each, in the order of the parts."""

    def __init__(self, device, head_dim, dtype):
        generator, place = torch.Generator().manual_seed(0), torch.device(device)
        layout = CodeLayout(head_dim, HEADS, MEAN, MEAN, block_tokens=P, element_bytes=dtype.itemsize)
        two = replace(layout, num_kv_heads=2, raw_tokens=layout.tail_tokens)
        layouts = [replace(two, key_sparsity=own, value_sparsity=own) for own in PART_SPARSITY]
        books = [
            tuple(ops.with_fast_atoms(random_codebook(256, one, generator, place, dtype), MEAN) for _ in range(2))
            for one in layouts
        ]
        pages = torch.zeros(PAGES, layout.page_bytes, dtype=torch.uint8, device=place)
        tail = torch.zeros(PAGES, HEADS, layout.tail_tokens, 2, head_dim, dtype=dtype, device=place)
        self.parts = LayerParts.cut(pages, pages, tail, books, layout, layouts, None, GROUP)
        self.alone = [self._own(part.cache.head(at)) for part in self.parts.parts for at in range(2)]
        shape = TOKENS, HEADS, head_dim
        self.key, self.value = (torch.randn(shape, generator=generator).to(place, dtype) for _ in range(2))
        self.query = torch.randn(TOKENS, HEADS * GROUP, head_dim, generator=generator).to(place, dtype)
        at, size = torch.arange(TOKENS, device=place), layout.tail_tokens
        blocks, tails = (torch.arange(1, 1 + -(-TOKENS // tokens), device=place).int()[None] for tokens in (P, size))
        tails = tails + len(blocks[0])
        bounds = (torch.tensor([end], dtype=torch.int32, device=place) for end in (size, TOKENS // 2 // size * size))
        self.tables = RequestTables(blocks, tails, *bounds)
        self.slots = tails[0].long()[at // size] * size + at % size
        self.source, self.places = at.int(), blocks[0].long()[at // P] * P + at % P
        self.parts.write_tail(self.key, self.value, self.slots)
        for head, cache in enumerate(self.alone):
            ops.write_tail(*self._of(head), cache, self.slots)

    def _own(self, cache):
        """Empty pages of a head's own."""
        codes = torch.zeros(PAGES, cache.layout.page_bytes, dtype=torch.uint8, device=cache.code_pages.device)
        return replace(cache, code_pages=codes, tail_pages=torch.zeros_like(cache.tail_pages).contiguous())

    def _of(self, head):
        return self.key[:, head : head + 1].contiguous(), self.value[:, head : head + 1].contiguous()

    def code(self):
        self.parts.omp_encode(self.key, self.value, self.source, self.places, relative_error=0.0)
        for head, cache in enumerate(self.alone):
            ops.omp_encode(*self._of(head), cache, self.source, self.places)

    def codes(self):
        """Of each head, in parts and alone."""
        heads = [part.cache.head(at) for part in self.parts.parts for at in range(2)]
        return [(head.code_pages, alone.code_pages) for head, alone in zip(heads, self.alone, strict=True)]


DEVICES = [
    ("cpu", 64, torch.float32, 1e-5),
    pytest.param(("cuda", 64, torch.bfloat16, 2e-2), marks=pytest.mark.gpu),
    pytest.param(("cuda", 128, torch.bfloat16, 2e-2), marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES, ids=lambda given: f"{given[0]}-{given[1]}")
def both(request):
    *how, tolerance = request.param
    found = Both(*how)
    found.tolerance = tolerance
    return found


def test_parts_write_their_own_codes_and_nothing_else(both):
    both.code()
    assert all(alone.count_nonzero() > 0 and torch.equal(part, alone) for part, alone in both.codes())


def test_heads_of_a_sparsity_share_a_launch_in_decode(both):
    """The same tokens, read from the tail."""
    stacks = stacked(replace(both.parts, by_head=True).caches_to_stack())
    assert [[cache.layout.key_sparsity for cache in stack.caches] for stack in stacks] == [[3, 3], [11, 11]]
    from_tail = (-1 - both.slots).int()
    for stack in stacks:
        ops.omp_encode_layers(stack, from_tail, both.places)
    for cache in both.alone:
        (stack,) = stacked([cache])
        ops.omp_encode_layers(stack, from_tail, both.places)
    assert all(alone.count_nonzero() > 0 and torch.equal(part, alone) for part, alone in both.codes())


def test_tokens_read_as_from_single_heads(both):
    both.code()
    out, tokens = torch.empty_like(both.query), torch.arange(TOKENS, device=both.query.device)
    requests, lengths = torch.zeros_like(tokens).int(), torch.full_like(tokens, TOKENS).int()
    step = both.tables, requests, lengths
    sinks = torch.linspace(-1, 2, HEADS * GROUP, device=out.device)
    both.parts.sparse_decode(both.query, *step, scale=SCALE, sinks=sinks, out=out)
    rebuilt, expected = torch.zeros(2, 2, TOKENS, HEADS, both.key.shape[2], device=out.device, dtype=out.dtype)
    both.parts.reconstruct(both.tables, requests, tokens.int(), *rebuilt)
    for head, cache in enumerate(both.alone):
        own = slice(head * GROUP, (head + 1) * GROUP)
        query, own_sinks = both.query[:, own].contiguous(), sinks[own].clone()
        attended, _ = ops.sparse_decode(query, cache, *step, scale=SCALE, sinks=own_sinks)
        torch.testing.assert_close(out[:, own], attended, rtol=both.tolerance, atol=both.tolerance)
        ops.reconstruct(cache, both.tables, requests, tokens.int(), *expected[:, :, head : head + 1])
    torch.testing.assert_close(rebuilt, expected, rtol=both.tolerance, atol=both.tolerance)
    assert not torch.allclose(rebuilt[0], both.key.to(rebuilt.dtype), atol=0.1)  # codes were read


def test_heads_are_put_into_the_parts_order():
    kv = torch.tensor(ORDER)
    order = HeadOrder(kv, (kv[:, None] * GROUP + torch.arange(GROUP)).flatten())
    rows = torch.arange(HEADS * GROUP, dtype=torch.float32)[None, :, None]
    query, key, value = order.batch(rows, rows[:, :HEADS], 2 * rows[:, :HEADS])
    assert key[0, :, 0].tolist() == list(ORDER) and torch.equal(value, 2 * key)
    assert (query[0, :, 0].long() // GROUP).tolist() == [head for head in ORDER for _ in range(GROUP)]
    assert torch.equal(torch.zeros_like(rows).index_copy_(1, order.heads, query), rows)
