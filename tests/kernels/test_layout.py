"""Sizes and offsets worked by hand."""

import pytest
from lexico_kernels.memory.layout import KV, CodeLayout, Field


def layout(D=128, Hk=8, S=15, **kwargs):
    return CodeLayout(D, Hk, S, kwargs.pop("value_sparsity", S), **kwargs)


def test_default_is_an_eighth():
    it = layout()
    assert (it.key_bytes, it.value_bytes, it.token_bytes) == (32, 32, 64)
    assert (it.raw_token_bytes, it.ratio) == (512, 0.125)
    assert (it.head_bytes, it.page_bytes) == (128 * 64, 8 * 128 * 64)
    assert (it.tail_tokens, it.tail_page_bytes) == (16, it.page_bytes)


@pytest.mark.parametrize(
    ("kwargs", "token_bytes", "tail_tokens", "padding_bytes"),
    [
        ({"S": 7}, 32, 8, 0),
        ({"S": 11}, 48, 8, 8 * (128 * 48 - 8 * 512)),  # 12 raw tokens would fit: 8 is the power of two
        ({"D": 64}, 64, 32, 0),
        ({"S": 23}, 96, 16, 8 * (128 * 96 - 16 * 512)),
        ({"S": 15, "value_sparsity": 7}, 48, 8, 8 * (128 * 48 - 8 * 512)),
        ({"element_bytes": 4}, 64, 8, 0),
        ({"codec": "exact"}, 512, 128, 0),
        ({"codec": "paper"}, 94, 16, 8 * (128 * 94 - 16 * 512)),
    ],
)
def test_page_arithmetic(kwargs, token_bytes, tail_tokens, padding_bytes):
    it = layout(**kwargs)
    assert (it.token_bytes, it.tail_tokens) == (token_bytes, tail_tokens)
    assert it.page_bytes - it.tail_page_bytes == padding_bytes


@pytest.mark.parametrize(
    ("kwargs", "token_bytes", "cell_bytes"),
    [
        ({"codec": "paper", "value_sparsity": 4}, 61, 62),
        ({"codec": "paper", "S": 7, "value_sparsity": 5, "element_bytes": 4}, 40, 40),
        ({"codec": "paper", "S": 7, "element_bytes": 4}, 46, 48),
        ({"S": 15, "value_sparsity": 4, "element_bytes": 4}, 42, 44),
    ],
)
def test_a_page_is_whole_numbers_of_the_model_dtype(kwargs, token_bytes, cell_bytes):
    it = layout(**kwargs)
    assert (it.token_bytes, it.cell_bytes, it.page_bytes) == (token_bytes, cell_bytes, 8 * 128 * cell_bytes)


def test_packed16_records_of_a_span_lie_word_by_word():
    it = layout(S=15, value_sparsity=14)
    assert it.fields("key") == {"words": Field(0, 4, 8, 32, 1024)}
    assert it.fields("value") == {"words": Field(0, 4, 7, 32, 960), "last entry": Field(896, 2, 1, 32, 960)}
    assert it.kv_offset_bytes("value") == 128 * 32
    assert it.address("key") == (15, 0, 32) and it.address("value") == (14, 4096, 30)


def test_paper_keeps_two_byte_fields_aligned():
    it = layout(S=15, codec="paper")
    assert it.key_bytes == 3 * 15 + 2
    assert it.fields("key") == {
        "scale": Field(0, 2, 1, 128, 128 * 47),
        "indices": Field(256, 30, 1, 128, 128 * 47),
        "coefficients": Field(256 + 128 * 30, 15, 1, 128, 128 * 47),
    }
    for kv in KV:
        wide = [field for name, field in it.fields(kv).items() if name != "coefficients"]
        assert all((it.kv_offset_bytes(kv) + field.offset_bytes) % 2 == field.width_bytes % 2 == 0 for field in wide)


def test_exact_vectors_follow_one_another():
    it = layout(codec="exact")
    assert it.fields("value") == {"vector": Field(0, 256, 1, 128, 128 * 256)}
    assert it.address("value") == (0, 128 * 256, 256)


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"codec": "zip"}, "packed16"),
        ({"S": 0}, "1 to 31"),
        ({"S": 32}, "1 to 31"),
        ({"D": 72}, "multiples of 16"),
        ({"D": 512}, "256"),
        ({"Hk": 0}, "1 or more"),
        ({"block_tokens": 100}, "powers of two"),
        ({"block_tokens": 16}, "from 32"),
        ({"element_bytes": 1}, "2 or 4"),
        ({"D": 256, "S": 1, "block_tokens": 32, "element_bytes": 4}, "at least one"),
    ],
)
def test_refusals_say_what_is_allowed(kwargs, word):
    with pytest.raises(ValueError, match="allowed") as error:
        layout(**kwargs)
    assert word in str(error.value)
