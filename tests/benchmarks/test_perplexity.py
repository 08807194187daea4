"""Perplexity with a coded cache on the CPU: attention by hand, codecs against the twins, text, the script's rows."""

import json
import math
import sys
from argparse import Namespace

import pytest
import torch
from lexico_kernels import reference
from lexico_kernels.memory.layout import KV, CodeLayout

from vllm_lexico.dictionary.file import GAINS, load_dictionary

SINKS, WINDOW, SKIP, LENGTH = 4, 8, 6, 48

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def perplexity(import_benchmark):
    return import_benchmark("perplexity")


@pytest.fixture(scope="module")
def codecs(perplexity):
    return sys.modules["bench.vector_codecs"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_letters_model):
    return write_letters_model(tmp_path_factory.mktemp("tiny"), layers=2, kv_heads=2)


@pytest.fixture(scope="module")
def dictionary(model, load_benchmark):
    return load_dictionary(load_benchmark("bench/shapes").write_random_dictionary(model, atoms=64))


@pytest.fixture(scope="module")
def measure(perplexity, model):
    return perplexity.CodedPerplexity(str(model), "cpu", SINKS, WINDOW, SKIP)


@pytest.fixture(scope="module")
def windows():
    return torch.randint(64, (3, LENGTH), generator=torch.Generator().manual_seed(0))


def identity(layer, kv, vectors):
    return vectors


def halved(layer, kv, vectors):
    return vectors / 2


def test_an_identity_codec_is_the_model(measure, windows):
    base = measure.negative_log_likelihood(windows)
    same = measure.negative_log_likelihood(windows, identity, batch=2)
    assert base.dtype == torch.float64 and base.shape == (3,) and measure.seconds > 0
    torch.testing.assert_close(same, base, atol=1e-5, rtol=0)


def test_the_loss_is_transformers_own(measure, model, windows):
    from transformers import AutoModelForCausalLM

    logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(windows).logits.log_softmax(-1)
    own = -logits[:, :-1].gather(2, windows[:, 1:, None]).squeeze(2)[:, SKIP:].mean(1)
    torch.testing.assert_close(measure.negative_log_likelihood(windows).float(), own, atol=1e-5, rtol=0)


def test_logits_in_pieces_change_nothing(measure, windows, monkeypatch):
    base = measure.negative_log_likelihood(windows, batch=3)
    monkeypatch.setattr(sys.modules["bench.coded_model"], "LOGITS_AT_ONCE", 64 * 7)
    torch.testing.assert_close(measure.negative_log_likelihood(windows, batch=3), base, atol=1e-6, rtol=0)


def test_a_codec_that_loses_all_changes_the_loss(measure, windows):
    base = measure.negative_log_likelihood(windows)
    zeros = measure.negative_log_likelihood(windows, lambda layer, kv, vectors: torch.zeros_like(vectors))
    assert (zeros - base).abs().min() > 1e-3


def test_a_codec_gets_the_distant_tokens_of_a_batch_at_once(measure, windows):
    calls = []

    def watch(layer, kv, vectors):
        calls.append((layer, kv, vectors.shape))
        return vectors

    measure.negative_log_likelihood(windows, watch, batch=3)
    shape = (3 * (LENGTH - SINKS - WINDOW), 2, 16)
    assert calls == [(layer, kv, shape) for layer in range(2) for kv in KV]


def test_a_window_as_long_as_the_text_needs_no_codes(perplexity, model, measure, windows):
    wide = perplexity.CodedPerplexity(str(model), "cpu", SINKS, LENGTH, SKIP)
    coded = wide.negative_log_likelihood(windows, halved)
    assert torch.equal(coded, measure.negative_log_likelihood(windows))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """A Gemma 3 of four layers, of which the last reads all tokens and the others a window of 12."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, query_pre_attn_scalar=16, sliding_window=12, initializer_range=0.2,
        layer_types=["sliding_attention"] * 3 + ["full_attention"], bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mixed")
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder


def test_layers_with_windows_are_read_as_they_are(perplexity, codecs, mixed, load_benchmark, windows):
    from transformers import AutoModelForCausalLM

    dictionary = load_dictionary(load_benchmark("bench/shapes").write_random_dictionary(mixed, atoms=64))
    layers = dictionary.info.fingerprint.layers
    measure = perplexity.CodedPerplexity(str(mixed), "cpu", SINKS, WINDOW, SKIP, layers)
    logits = AutoModelForCausalLM.from_pretrained(mixed, dtype=torch.float32)(windows).logits.log_softmax(-1)
    own = -logits[:, :-1].gather(2, windows[:, 1:, None]).squeeze(2)[:, SKIP:].mean(1)
    base = measure.negative_log_likelihood(windows)
    torch.testing.assert_close(base.float(), own, atol=1e-5, rtol=0)
    torch.testing.assert_close(measure.negative_log_likelihood(windows, identity), base, atol=1e-5, rtol=0)
    calls = []

    def watch(layer, kv, vectors):
        calls.append((layer, kv))
        return vectors / 2

    assert (measure.negative_log_likelihood(windows, watch, batch=3) - base).abs().min() > 1e-4
    assert layers == (3,) and calls == [(3, kv) for kv in KV]
    codec = codecs.DictionaryCodec(dictionary, "cpu", 5, 3)
    assert (measure.negative_log_likelihood(windows, codec) - base).abs().min() > 1e-4
    assert all(0 < share < 2 for share in codec.energy_lost().values())
    with pytest.raises(ValueError, match="layer 0 has sliding or uneven attention"):
        perplexity.CodedPerplexity(str(mixed), "cpu", SINKS, WINDOW, SKIP).negative_log_likelihood(windows)


@pytest.mark.parametrize("length", [1, WINDOW, SINKS + WINDOW, SINKS + WINDOW + 1, 29])
def test_attention_reads_each_token_from_the_right_place(measure, length):
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(2, heads, length, 16, generator=generator) for heads in (4, 2, 2))
    measure._codec = halved
    attended = measure.attend(0, query, key, value, 0.3)
    for batch, head, at in [(b, h, i) for b in range(2) for h in range(4) for i in range(length)]:
        raw = [at - j < WINDOW or j < SINKS for j in range(at + 1)]
        keys, values = (
            torch.stack([x[batch, head // 2, j] / (1 if raw[j] else 2) for j in range(at + 1)]) for x in (key, value)
        )
        expected = (keys @ query[batch, head, at] * 0.3).softmax(0) @ values
        torch.testing.assert_close(attended[batch, head, at], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"window": 0}, {"sinks": -1}, {"skip": -1}])
def test_impossible_settings_are_refused(perplexity, model, settings):
    with pytest.raises(ValueError, match="allowed"):
        perplexity.CodedPerplexity(str(model), "cpu", **settings)


def test_windows_too_short_to_score_are_refused(measure):
    with pytest.raises(ValueError, match="more than 7 tokens"):
        measure.negative_log_likelihood(torch.zeros(1, SKIP + 1, dtype=torch.int64))


@pytest.mark.parametrize(("bits", "expected"), [(1, 0.363), (2, 0.117), (3, 0.0345), (4, 0.0095)])
def test_rotation_loses_what_lloyd_max_loses(codecs, bits, expected):
    means = torch.full((1, 2, 3, 256), 5.0)  # small heads lose less: their numbers have no long tails
    vectors = 5 + 0.1 * torch.randn(1000, 3, 256, generator=torch.Generator().manual_seed(0))
    codec = codecs.RotationCodec(256, bits, means)
    read = codec(0, "value", vectors)
    share = float((read - vectors).square().sum() / (vectors - 5).square().sum())
    assert share == pytest.approx(expected, rel=0.03)
    assert codec.energy_lost()["value"] == pytest.approx(share, rel=1e-5) and math.isnan(codec.energy_lost()["key"])
    assert codec.vector_bytes == {"key": 32 * bits + 2, "value": 32 * bits + 2}


def test_levels_of_two_bits_are_the_published_ones(codecs):
    assert codecs.gaussian_levels(2).tolist() == pytest.approx([-1.5104, -0.4528, 0.4528, 1.5104], abs=1e-4)


def test_rotation_of_odd_sizes_is_refused(codecs):
    with pytest.raises(ValueError, match="power of two"):
        codecs.RotationCodec(96, 2, torch.zeros(1, 2, 1, 96))
    with pytest.raises(ValueError, match="1 to 4"):
        codecs.RotationCodec(64, 5, torch.zeros(1, 2, 1, 64))


@pytest.mark.parametrize("codec", ["packed16", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dictionary_codec_is_the_twins(codecs, dictionary, codec, dtype):
    coder = codecs.DictionaryCodec(dictionary, "cpu", 5, 3, codec)
    layout = CodeLayout(16, 2, 5, 3, codec, element_bytes=dtype.itemsize)
    assert coder.vector_bytes == {"key": layout.key_bytes, "value": layout.value_bytes}
    squares = dict.fromkeys(KV, (0.0, 0.0))
    for count in (300, 1, 7, 301):  # pages grow and are used again
        for kv in KV:
            vectors = torch.randn(count, 2, 16, generator=torch.Generator().manual_seed(count)).to(dtype)
            book = dictionary.codebook(1, kv, layout.sparsity(kv), dtype=dtype)
            records = reference.encode_heads(vectors, book, layout, kv)
            expected = reference.decode_heads(records, book, layout, kv, dtype).to(dtype)
            assert torch.equal(coder(1, kv, vectors), expected)
            lost, energy = ((x.float() - vectors.float()).square().sum().item() for x in (expected, torch.zeros(())))
            squares[kv] = (squares[kv][0] + lost, squares[kv][1] + energy)
    assert coder.read_back(0, "key", vectors[:0]).shape == (0, 2, 16)
    for at, kv in enumerate(KV):  # means are zeros in this dictionary
        assert coder.lost[1, at].item() == pytest.approx(squares[kv][0], rel=1e-5)
        assert coder.energy[1, at].item() == pytest.approx(squares[kv][1], rel=1e-5)


def test_ratio_and_its_interval(perplexity):
    base = torch.tensor([1.0, 2.0, 3.0, 4.0])
    value, half_width = perplexity.ratio(base + torch.tensor([0.1, 0.3, 0.1, 0.3]), base)
    assert value == pytest.approx(math.exp(0.2))
    assert half_width == pytest.approx(1.96 * math.sqrt(0.04 / 3) / 2 * math.exp(0.2), rel=1e-6)
    assert math.isnan(perplexity.ratio(base[:1], base[:1])[1])


def test_windows_are_cut_one_after_the_other(perplexity, model, tmp_path):
    from transformers import AutoTokenizer

    tokenizer, path = AutoTokenizer.from_pretrained(model), tmp_path / "text.txt"
    path.write_text("abcdefghijk")
    assert perplexity.wikitext_windows(path, tokenizer, 4).tolist() == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert perplexity.wikitext_windows(path, tokenizer, 4, 1).tolist() == [[2, 3, 4, 5]]
    with pytest.raises(ValueError, match="fills 2 windows"):
        perplexity.wikitext_windows(path, tokenizer, 4, 3)
    with pytest.raises(ValueError, match="no text file"):
        perplexity.wikitext_windows(tmp_path / "absent", tokenizer)
    path.write_text('{"text": "ab"}\n{"question": "c", "answer": "d"}\n')
    rows = perplexity.jsonl_windows(path, tokenizer, 1).flatten().tolist()
    assert tokenizer.decode(rows).replace(" ", "") == "ab???uestion??c??nswer??d"
    path.write_text('{"title": "ab"}\n')
    with pytest.raises(ValueError, match="cannot be read"):
        perplexity.jsonl_windows(path, tokenizer)


def test_windows_begin_with_what_requests_begin_with(perplexity, tmp_path):
    class Letters:
        bos_token_id = 7

        def __call__(self, text, **kwargs):
            return {"input_ids": [7, *map(ord, text)]}

    (tmp_path / "text.txt").write_text("abcdefgh")
    found = perplexity.wikitext_windows(tmp_path / "text.txt", Letters(), 4)
    assert found.tolist() == [[7, *map(ord, "abc")], [7, *map(ord, "def")]]
    for length in (1, 0, 10):
        with pytest.raises(ValueError, match="fills 0 windows"):
            perplexity.wikitext_windows(tmp_path / "text.txt", Letters(), length)


def script_args(model, folder, **changed):
    given = {
        "model": str(model), "data": folder, "dictionary": str(model / "random.safetensors"), "text": "wikitext",
        "caches": "lexico:5/3,rotation:2", "windows": 2, "length": LENGTH, "skip": SKIP, "sinks": SINKS,
        "window": WINDOW, "batch": 2, "device": "cpu", "out": folder / "out", "gains": None,
    }  # fmt: skip
    return Namespace(**(given | changed))


def test_the_script_prints_and_records(perplexity, model, dictionary, tmp_path, capsys, monkeypatch):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 5)
    monkeypatch.setitem(perplexity.TEXTS, "wikitext", ("text.txt", perplexity.wikitext_windows))
    perplexity.run(script_args(model, tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "out" / "dictionary.jsonl").read_text().splitlines()]
    lost = [row for row in rows if row["metric"] == "energy_lost"]
    assert [(row["case"]["codec"], row["case"]["part"], row["case"]["bytes"]) for row in lost] == [
        ("packed16", "key", 12), ("packed16", "value", 8), ("rotation", "key", 6), ("rotation", "value", 6),
    ]  # fmt: skip
    rows = [row for row in rows if row not in lost]
    assert [row["case"]["codec"] for row in rows] == ["packed16", "rotation"]
    assert [row["value"] for row in lost] == pytest.approx(
        [row["case"]["energy_lost"][kv] for row in rows for kv in ("key", "value")], abs=1e-5
    )
    assert rows[0]["case"]["sparsity"] == {"key": 5, "value": 3} and rows[0]["case"]["bytes_percent"] == 31.25
    assert rows[0]["metric"] == "perplexity_ratio" and rows[0]["value"] > 0 and rows[0]["peer"] is None
    assert rows[1]["case"] | {"bits": 2, "windows": 2, "atoms": 64, "dtype": "float32"} == rows[1]["case"]
    assert "lexico:5/3" in capsys.readouterr().out
    perplexity.run(script_args(model, tmp_path, caches="lexico:5/3", gains=[0.0, 0.0]))
    plain = json.loads((tmp_path / "out" / "dictionary.jsonl").read_text().splitlines()[6])["case"]
    assert (rows[0]["case"]["gains"], plain["gains"]) == (list(GAINS.values()), [0, 0])
    # A gain is no better in energy than what the pursuit finds.
    assert all(plain["energy_lost"][kv] < rows[0]["case"]["energy_lost"][kv] for kv in ("key", "value"))


@pytest.mark.parametrize("cache", ["", "lexico", "lexico:x", "lexico:1/2/3", "lexico:32", "rotation:2/2", "other:1"])
def test_caches_that_do_not_exist_are_refused(perplexity, model, dictionary, tmp_path, cache):
    with pytest.raises(ValueError, match="allowed"):
        perplexity.run(script_args(model, tmp_path, caches=cache))


def test_a_model_that_is_not_there_is_refused(perplexity, tmp_path):
    with pytest.raises(ValueError, match="no model's folder"):
        perplexity.run(script_args(tmp_path / "absent", tmp_path))
