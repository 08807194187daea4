"""Settings: what is accepted, and what a refusal says."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lexico_kernels.memory.layout import CODECS, MAX_SPARSITY

from vllm_lexico import errors
from vllm_lexico.config import PREFIX_HITS, LexicoConfig, Sparsity, without_backend


def read(**lexico):
    return LexicoConfig.from_additional_config({"lexico": lexico})


def refused(additional_config):
    with pytest.raises(ValueError) as error:
        LexicoConfig.from_additional_config(additional_config)
    return str(error.value)


def is_one_sentence(said):
    return said.isprintable() and ". " not in said and not said.endswith(".") and 10 < len(said) < 500


def test_defaults_without_settings():
    assert LexicoConfig.from_additional_config(None) == LexicoConfig.from_additional_config({}) == LexicoConfig()
    assert LexicoConfig().sparsity == Sparsity(15, 15)


def test_one_number_or_one_for_keys_and_one_for_values():
    assert read(sparsity=7).sparsity == Sparsity(7, 7)
    assert read(sparsity={"key": 15, "value": 11}).sparsity == Sparsity(15, 11)


@pytest.mark.parametrize(
    "lexico, words",
    [
        ({"sparsty": 7}, ["'sparsty'", "known are dictionary, sparsity", "did you mean sparsity?"]),
        ({"colour": 7}, ["'colour'", "known are dictionary, sparsity", "correct or remove it"]),
        ({"sparsity": 0}, ["given as 0", "from 1 to 31", "12.5 %"]),
        ({"sparsity": True}, ["given as True"]),
        ({"sparsity": {"key": 15}}, ["'key': 15", '"value": number']),
        ({"window": -1}, ["window", "-1", "from 0 to 65536"]),
        ({"sinks": 1.5}, ["sinks", "1.5", "from 0 to 1024"]),
        ({"relative_error": 1.0}, ["relative_error", "1.0", "up to, not including, 1"]),
        ({"prefix_hits": "none"}, ["'none'", "'codes', 'window' or 'same'"]),
        ({"coded_later": -1}, ["coded_later", "-1", "from 0 to 1048576"]),
        ({"uneven": [15, 31]}, ["uneven", "[15, 31]", "low < 15 < high <= 31", "leave it out"]),
        ({"uneven": [3, 32]}, ["uneven", "[3, 32]", "high <= 31"]),
        ({"uneven": 3}, ["uneven", "3", "[low, high]"]),
        ({"uneven": [3, 15, 31]}, ["uneven", "[3, 15, 31]", "[low, high]"]),
        ({"uneven": [3, 31], "sparsity": {"key": 15, "value": 11}}, ["uneven", "one sparsity for both"]),
        ({"uneven": [3, 31], "codec": "exact"}, ["exact", "remove uneven"]),
        ({"coded_later": 64, "prefix_hits": "same"}, ['"same"', "remove coded_later"]),
        ({"codec": "int8"}, ["'int8'", "'packed16', 'paper' or 'exact'"]),
        ({"dictionary": ""}, ["dictionary", 'a Hugging Face id or "train"']),
        (
            {"codec": "exact", "relative_error": 0.1},
            ["takes no sparsity", "remove relative_error, or"],
        ),
        ({"codec": "exact", "sparsity": 15}, ["takes no sparsity", "remove sparsity,"]),
        ({"codec": "exact", "sparsity": 7, "dictionary": "a"}, ["remove sparsity and dictionary,"]),
    ],
)
def test_refusals_say_what_is_allowed(lexico, words):
    said = refused({"lexico": lexico})
    assert all(word in said for word in words) and is_one_sentence(said), said


@pytest.mark.parametrize(
    "additional_config, words",
    [
        ({"lexico": 15}, ["given as 15", "an object of settings"]),
        ({"sparsity": 7}, ["sparsity stands beside", """'{"lexico": {"sparsity": 7}}'"""]),
        ({"lexico": {"sparsity": 7}, "sinks": 0}, ["sinks stands beside", """'{"lexico": {"sinks": 0}}'"""]),
        ({"window": object()}, ["window stands beside", """'{"lexico": {"window": ...}}'"""]),
        ({"Lexico": {"sparsity": 7}}, ["'Lexico'", 'write it as "lexico"']),
    ],
)
def test_settings_stand_under_their_key(additional_config, words):
    said = refused(additional_config)
    assert all(word in said for word in words) and is_one_sentence(said), said


def test_settings_of_others_are_none_of_ours():
    assert LexicoConfig.from_additional_config({"gdn_prefill_backend": "triton", 7: 8}) == LexicoConfig()


def test_settings_without_the_backend_name_the_flag():
    said = without_backend({"lexico": {"sparsity": 7}})
    assert said and "--attention-backend LEXICO" in said and is_one_sentence(said)
    assert without_backend({"sparsity": 7}) is without_backend(None) is without_backend({}) is None


ABSENT = object()
ODD = [None, True, False, 2**70, 10**5000, float("nan"), float("inf"), -0.0, b"x", 1j, object(), [], {}, "", "\ud800"]
ODD += ["a\nb", "\x1b[31m", "x" * 10_000, {"key": 3}, {None: 1, "b": 2}, json.loads("[" * 500 + "]" * 500)]
USUAL = {
    "dictionary": [None, "train", "org/name", "a file.safetensors"],
    "sparsity": [0, 1, 7, 31, 32, {"key": 1, "value": 31}, {"key": 0, "value": 3}, {"key": 1, "value": 2, "query": 3}],
    "window": [-1, 0, 63, 65536, 65537, 1.5],
    "sinks": [-1, 0, 16, 1024, 1025, "16"],
    "relative_error": [-0.1, 0, 0.5, 0.999, 1, 1.0],
    "prefix_hits": [*PREFIX_HITS, "none", "CODES"],
    "codec": [*CODECS, "int8"],
    "coded_later": [-1, 0, 8192, 1 << 20, True],
    "uneven": [None, [3, 31], [31, 3], (3, 31), [15], "3/31", [True, 31]],
}
COMBINATIONS = math.prod(3 * len(values) for values in USUAL.values())
WILD = st.one_of(st.sampled_from(ODD), st.text(max_size=8), st.floats(), st.integers(-(2**40), 2**40))
WILD_NAMES = st.sampled_from([ABSENT, ABSENT, ABSENT, *USUAL, "sparcity", "", "\ud800", "x" * 1000, 5, None, ("a",)])
BESIDE = st.sampled_from([{}] * 12 + [{"other": 1}, {5: 6}, {"Lexico": 1}, {"window": ODD[-1]}, {"codec": 10**5000}])


def usual_settings(number):
    """The combination of that number: two thirds of the time a setting is left out."""
    lexico = {}
    for name, values in USUAL.items():
        number, at = divmod(number, 3 * len(values))
        if at >= 2 * len(values):
            lexico[name] = values[at - 2 * len(values)]
    return lexico


# One number for all usual settings: hypothesis spends most of its time on single draws.
@settings(max_examples=3000, deadline=None, database=None)
@given(st.integers(0, COMBINATIONS - 1), WILD_NAMES, WILD, BESIDE)
def test_random_settings_load_right_or_are_refused_in_a_sentence(number, name, wild, beside):
    lexico = usual_settings(number)
    lexico |= {} if name is ABSENT else {name: wild}
    try:
        config = LexicoConfig.from_additional_config({"lexico": lexico} | beside)
    except ValueError as error:
        assert is_one_sentence(str(error)), str(error)
        return
    assert not {"Lexico", "window", "codec"} & set(beside) and set(lexico) <= set(USUAL)
    sparsity = lexico.get("sparsity", 15)
    both = sparsity if isinstance(sparsity, dict) else {"key": sparsity, "value": sparsity}
    assert vars(config.sparsity) == both and all(1 <= number <= MAX_SPARSITY for number in both.values())
    for key, default in vars(LexicoConfig()).items():
        given = lexico.get(key, default)
        assert key == "sparsity" or getattr(config, key) == (tuple(given) if isinstance(given, list) else given)
    assert 0 <= config.window <= 65536 and 0 <= config.sinks <= 1024 and 0 <= config.relative_error < 1
    assert config.dictionary is None or config.dictionary
    assert config.codec in CODECS and config.prefix_hits in PREFIX_HITS
    assert config.codec != "exact" or not {"sparsity", "relative_error"} & set(lexico)


@given(WILD)
@settings(max_examples=50, deadline=None, database=None)
def test_any_value_as_the_settings_or_the_whole(wild):
    for additional_config in ({"lexico": wild}, wild):
        try:
            assert LexicoConfig.from_additional_config(additional_config) == LexicoConfig()
        except ValueError as error:
            assert is_one_sentence(str(error)), str(error)


def test_values_are_shown_short_and_on_one_line():
    class Broken:
        def __repr__(self):
            raise RuntimeError

    for value in ("a\nb", "\ud800", "x" * 10_000, 10**5000, [[[[[[1]]]]]], Broken(), {"a": 1, 2: 3}):
        said = errors.shown(value)
        assert said.isprintable() and 0 < len(said) < 200, said
    assert errors.shown(7) == "7" and errors.shown("seven") == "'seven'"
    assert errors.either([64, 128, 256]) == "64, 128 or 256" and errors.either(["a"]) == "a"
