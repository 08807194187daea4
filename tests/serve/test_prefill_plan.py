"""Tiles of history cover what requests in prefill have computed before, once, and join to the attention over all."""

import itertools

import pytest
import torch

pytest.importorskip("vllm")
from vllm_lexico.serve.dense_attention import dense_attention, merge_into
from vllm_lexico.serve.prefill_plan import plan_prefill

CPU = torch.device("cpu")
STEPS = [  # new tokens, tokens computed before
    ([5], [0]),
    ([5], [23]),
    ([5, 3, 9], [10, 10, 10]),
    ([5, 3, 9, 1], [4, 0, 35, 2]),
    ([2, 7, 4], [0, 0, 0]),
    ([4, 6, 0, 0], [12, 8, 0, 0]),  # padding
]


@pytest.mark.parametrize(("query_lens", "computed"), STEPS)
@pytest.mark.parametrize("tile_tokens", [1, 8, 12, 100])
def test_tiles_cover_all_history_once(query_lens, computed, tile_tokens):
    seq_lens = [c + q for c, q in zip(computed, query_lens, strict=True)]
    plan = plan_prefill(query_lens, seq_lens, 3, tile_tokens, CPU)
    found = []
    for tile in plan.tiles:
        tokens = list(zip(tile.token_request.tolist(), tile.token_position.tolist(), strict=True))
        assert 0 < len(tokens) <= tile_tokens
        found += tokens
        pieces = [tokens[a:b] for a, b in itertools.pairwise(tile.keys.starts.tolist())]
        requests = [piece[0][0] for piece in pieces]
        assert all(request == first for first, piece in zip(requests, pieces, strict=True) for request, _ in piece)
        assert tile.keys.longest == max(map(len, pieces))
        lengths = [query_lens[request - 3] for request in requests]
        assert tile.queries.starts.diff().tolist() == lengths and tile.queries.longest == max(lengths)
        before = sum(query_lens[: requests[0] - 3])
        assert tile.rows == slice(before, before + sum(lengths))
    assert found == [(3 + i, position) for i, length in enumerate(computed) for position in range(length)]
    assert plan.num_tokens == sum(query_lens) and plan.chunks.starts[-1] == plan.num_tokens
    assert all(plan.chunks.starts.diff() > 0)


@pytest.mark.parametrize("tile_tokens", [7, 16, 1000])
def test_chunks_and_tiles_join_to_causal_attention(tile_tokens):
    query_lens, computed = [5, 3, 9, 1], [4, 0, 35, 2]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(c + q, 3, 2, 16, generator=generator) for c, q in zip(computed, query_lens, strict=True)]
    new = [tokens[c:] for tokens, c in zip(whole, computed, strict=True)]
    query = torch.cat(new)[:, 0].repeat_interleave(2, 1)
    chunk_key, chunk_value = torch.cat(new)[:, 1], torch.cat(new)[:, 2]
    plan = plan_prefill(query_lens, [len(tokens) for tokens in whole], 0, tile_tokens, CPU)
    scale = {"scale": 0.25}
    out, lse = dense_attention(query, chunk_key, chunk_value, plan.chunks, plan.chunks, causal=True, **scale)
    for tile in plan.tiles:
        tokens = zip(tile.token_request.tolist(), tile.token_position.tolist(), strict=True)
        history = torch.stack([whole[request][position] for request, position in tokens])
        seen = dense_attention(
            query[tile.rows], history[:, 1], history[:, 2], tile.queries, tile.keys, causal=False, **scale
        )
        merge_into(out[tile.rows], lse[:, tile.rows], *seen)
    at = 0
    for tokens, c, q in zip(whole, computed, query_lens, strict=True):
        seen = torch.arange(c, c + q)[:, None] >= torch.arange(c + q)
        heads = [part.repeat_interleave(2, 1).transpose(0, 1) for part in (tokens[:, 1], tokens[:, 2])]
        want = torch.nn.functional.scaled_dot_product_attention(
            query[at : at + q].transpose(0, 1), *heads, attn_mask=seen, scale=0.25
        )
        torch.testing.assert_close(out[at : at + q], want.transpose(0, 1), rtol=1e-4, atol=1e-5)
        at += q
