"""Dense attention with its log-sum-exp, and merging."""

import itertools

import pytest
import torch

pytest.importorskip("vllm")
from torch._subclasses.fake_tensor import FakeTensorMode

from vllm_lexico.serve import dense_attention as module
from vllm_lexico.serve.dense_attention import Packed, Paged, dense_attention, merge_into, paged_attention


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


@pytest.mark.parametrize(("device", "dtype", "flash"), [
    ("cpu", torch.float32, False), ("cpu", torch.bfloat16, False),
    ("cuda", torch.float32, False), ("cuda", torch.bfloat16, True), ("cuda", torch.float16, True),
])  # fmt: skip
def test_flash_attention_gets_half_precision_alone(monkeypatch, device, dtype, flash):
    taken = []
    for name in ("_flash_attention", "_plain_attention", "_plain_paged"):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: taken.append(name))
    with FakeTensorMode():
        query = torch.empty(4, 2, 64, dtype=dtype, device=device)
        dense_attention(query, query, query, None, None, scale=1.0, causal=True)
        paged_attention(query, query, query, None, Paged(None, None, 4, 2), scale=1.0)
        assert (module.scratch_bytes(query) == 0) == flash
    assert taken == (["_flash_attention"] * 2 if flash else ["_plain_attention", "_plain_paged"])


def test_the_plain_version_stays_on_its_device_and_within_its_memory(monkeypatch):
    query, keys, values = torch.randn(40, 4, 64), torch.randn(96, 2, 64), torch.randn(96, 2, 64)
    rows, table = (packed(0, 40), packed(0, 96)), torch.tensor([[2, 0, 1]], dtype=torch.int32)
    pages = Paged(table, torch.tensor([80], dtype=torch.int32), 80, 32)
    whole = dense_attention(query, keys, values, *rows, scale=0.1, causal=True)
    paged = paged_attention(query, keys, values, rows[0], pages, scale=0.1)
    order = [*range(64, 96), *range(32), *range(32, 48)]
    same = dense_attention(query, keys[order], values[order], rows[0], packed(0, 80), scale=0.1, causal=False)
    seen, attend = [], module._attend

    def counted(query, key, *args):
        seen.append(query.shape[0] * query.shape[1] * key.shape[0])
        return attend(query, key, *args)

    monkeypatch.setattr(module, "_attend", counted)
    monkeypatch.setattr(module, "SCORES", 3000)
    with torch.device("meta"):  # what names no device is nowhere
        cut = dense_attention(query, keys, values, *rows, scale=0.1, causal=True)
        cut_paged = paged_attention(query, keys, values, rows[0], pages, scale=0.1)
    for one, other in (
        *zip(whole, cut, strict=True),
        *zip(paged, cut_paged, strict=True),
        *zip(paged, same, strict=True),
    ):
        torch.testing.assert_close(one, other)
    assert max(seen) <= 3000 and len(seen) > 8
