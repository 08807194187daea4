"""Settings: what is accepted, and what a refusal says."""

import pytest

from vllm_lexico.config import LexicoConfig, Sparsity


def read(**settings):
    return LexicoConfig.from_additional_config({"lexico": settings})


def test_defaults_without_settings():
    assert LexicoConfig.from_additional_config(None) == LexicoConfig.from_additional_config({}) == LexicoConfig()
    assert LexicoConfig().sparsity == Sparsity(15, 15)


def test_one_number_or_one_a_part():
    assert read(sparsity=7).sparsity == Sparsity(7, 7)
    assert read(sparsity={"key": 15, "value": 11}).sparsity == Sparsity(15, 11)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"sparsty": 7}, ["'sparsty'", "known are dictionary, sparsity", "Correct or remove"]),
        ({"sparsity": 0}, ["given as 0", "from 1 to 31", "12.5 %"]),
        ({"sparsity": True}, ["given as True"]),
        ({"sparsity": {"key": 15}}, ["'key': 15", '"value": number']),
        ({"window": -1}, ["window", "-1", "from 0 to 65536"]),
        ({"sinks": 1.5}, ["sinks", "1.5", "from 0 to 1024"]),
        ({"relative_error": 1.0}, ["relative_error", "1.0", "up to, not including, 1"]),
        ({"prefix_hits": "none"}, ["'none'", "'codes' or 'window'"]),
        ({"codec": "int8"}, ["'int8'", "'packed16' or 'paper' or 'exact'"]),
        ({"dictionary": ""}, ["dictionary", 'a Hugging Face id or "train"']),
        ({"codec": "exact", "relative_error": 0.1}, ["neither a dictionary nor a relative_error", "packed16"]),
    ],
)
def test_refusals_say_what_is_allowed(settings, words):
    with pytest.raises(ValueError) as error:
        read(**settings)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_settings_must_be_an_object():
    with pytest.raises(ValueError, match="an object of settings"):
        LexicoConfig.from_additional_config({"lexico": 15})
