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


def test_packed16_record_is_contiguous():
    it = layout(S=15, value_sparsity=7)
    assert it.fields("key") == {"scale": Field(0, 32, 2), "entries": Field(2, 32, 30)}
    assert it.fields("value") == {"scale": Field(0, 16, 2), "entries": Field(2, 16, 14)}
    assert it.kv_offset_bytes("value") == 128 * 32
    assert it.address("value") == (7, 4096, 16, 4098, 16, 4098, 16)


def test_paper_keeps_two_byte_fields_aligned():
    it = layout(S=15, codec="paper")
    assert it.key_bytes == 3 * 15 + 2
    assert it.fields("key") == {
        "scale": Field(0, 2, 2),
        "indices": Field(256, 30, 30),
        "coefficients": Field(256 + 128 * 30, 15, 15),
    }
    for kv in KV:
        _, *numbers = it.address(kv)
        assert all(number % 2 == 0 for number in numbers[:4])


@pytest.mark.parametrize("codec", ["packed16", "paper", "exact"])
@pytest.mark.parametrize("S", [1, 15, 31])
def test_fields_cover_a_head_once(codec, S):
    it = layout(D=16, S=S, codec=codec, block_tokens=16)
    seen = [0] * it.head_bytes
    for kv in KV:
        for field in it.fields(kv).values():
            for token in range(16):
                start = it.kv_offset_bytes(kv) + field.offset_bytes + token * field.stride_bytes
                for byte in range(start, start + field.width_bytes):
                    seen[byte] += 1
    assert set(seen) == {1}


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
        ({"element_bytes": 1}, "2 or 4"),
        ({"D": 256, "S": 1, "block_tokens": 16, "element_bytes": 4}, "at least one"),
    ],
)
def test_refusals_say_what_is_allowed(kwargs, word):
    with pytest.raises(ValueError, match="allowed") as error:
        layout(**kwargs)
    assert word in str(error.value)
