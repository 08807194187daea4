"""Names of caches: what they mean to the engine, and which are refused."""

import pytest

from vllm_lexico.evals.caches import parse_cache, parse_caches
from vllm_lexico.evals.settings import DEFAULT_CACHES


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("bf16", {"kv_cache_dtype": "auto"}),
        ("bf16+backend=TRITON_ATTN", {"kv_cache_dtype": "auto", "attention_backend": "TRITON_ATTN"}),
        ("fp8", {"kv_cache_dtype": "fp8"}),
        ("turboquant_4bit_nc", {"kv_cache_dtype": "turboquant_4bit_nc"}),
        ("lexico:15", {"attention_backend": "LEXICO", "additional_config": {"lexico": {"sparsity": 15}}}),
        (
            "lexico:19/11+window=32+sinks=0+block_size=64",
            {
                "attention_backend": "LEXICO",
                "additional_config": {"lexico": {"sparsity": {"key": 19, "value": 11}, "window": 32, "sinks": 0}},
                "block_size": 64,
            },
        ),
    ],
)
def test_names_become_engine_arguments(name, engine):
    assert parse_cache(name).engine == engine


def test_the_dictionary_of_the_command_gives_way_to_the_cache_s_own():
    def lexico(name):
        return parse_cache(name, "all.safetensors").engine["additional_config"]["lexico"]

    assert lexico("lexico:7")["dictionary"] == "all.safetensors"
    assert lexico("lexico:7+dictionary=other.safetensors")["dictionary"] == "other.safetensors"
    assert "dictionary" not in lexico("lexico:7+codec=exact")
    assert lexico("lexico:7+relative_error=0.25+codec=paper")["relative_error"] == 0.25


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lexco:15", "'lexco:15' is unknown"),
        ("lexico", "does not say how many atoms"),
        ("lexico:a", "does not say how many atoms"),
        ("lexico:99", "sparsity was given as 99"),
        ("lexico:15+windw=3", r"\+windw=3 is no option"),
        ("lexico:15+window", r"\+window is no option, or given twice"),
        ("lexico:15+window=1+window=2", "given twice"),
        ("lexico:15+window=many", "window was given as 'many'"),
        ("lexico:15+backend=FLASH_ATTN", "has another backend"),
        ("fp8+window=32", "has no option window"),
        ("fp8:3", "'fp8:3' is unknown"),
        ("", "is unknown"),
        ("lexico:" + "9" * 5000, "control characters"),
        ("lexico:" + "9" * 150, "does not say how many atoms"),
        ("lexico:15+window=" + "[" * 170, "window was given as '\\["),
        ("lexico:15+window=NaN", "window was given as nan"),
        ("bf16\x1b[2J", r"cache 'bf16\\x1b\[2J' has more than 200 letters or control characters"),
    ],
)
def test_other_names_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        parse_cache(name)


def test_lists_and_folders():
    caches = parse_caches(DEFAULT_CACHES)
    assert [cache.folder for cache in caches[:4]] == ["lexico-15", "lexico-11", "lexico-7", "bf16"]
    assert [cache.family for cache in caches] == ["lexico"] * 3 + ["bf16", "fp8", "turboquant", "turboquant"]
    assert parse_cache("lexico:15/11+window=32").folder == "lexico-15-11-window-32"
    with pytest.raises(ValueError, match="share a folder"):
        parse_caches("lexico:15,lexico:15")
    with pytest.raises(ValueError, match="no cache was given"):
        parse_caches(" , ")
