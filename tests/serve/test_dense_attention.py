"""Dense attention with its log-sum-exp, and merging."""

import itertools

import pytest
import torch

pytest.importorskip("vllm")
from vllm_lexico.serve.dense_attention import Packed, dense_attention, merge_into


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


def test_scores_are_capped():
    query, keys, values = torch.randn(1, 2, 64), torch.randn(9, 2, 64), torch.randn(9, 2, 64)
    rows = packed(0, 1), packed(0, 9)
    out, lse = dense_attention(query, keys, values, *rows, scale=1.0, causal=False, soft_cap=5.0)
    scores = 5 * (torch.einsum("qhd,khd->hk", query, keys) / 5).tanh()
    torch.testing.assert_close(lse[:, 0], scores.logsumexp(-1))
    torch.testing.assert_close(out[0], torch.einsum("hk,khd->hd", scores.softmax(-1), values))
    uncapped, _ = dense_attention(query, keys, values, *rows, scale=1.0, causal=False)
    assert (out - uncapped).abs().max() > 0.1
