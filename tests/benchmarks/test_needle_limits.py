"""Where codes lose a needle: reading from a given history, what each way codes, ideal codes, rows; on the CPU."""

import json
import lzma

import pytest
import torch

from vllm_lexico.dictionary.file import load_dictionary

LENGTH = 900


@pytest.fixture(scope="module")
def limits(import_benchmark):
    return import_benchmark("needle_limits")


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_letters_model):
    return write_letters_model(tmp_path_factory.mktemp("tiny"), layers=2)


@pytest.fixture(scope="module")
def dictionary(model, load_benchmark):
    return load_benchmark("bench/shapes").write_random_dictionary(model, atoms=64)


@pytest.fixture(scope="module")
def reader(limits, model):
    return limits.Reader(str(model), "cpu", window=8)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    words = [a + b + c + "ing" for a in "bdfgk" for b in "aeiou" for c in "lmnr"]
    lines = [json.dumps({"text": "\n\n".join(" ".join(words[i:] + words[:i]) for i in range(3))}) for _ in range(2)]
    with lzma.open(folder / "train_textbooks.jsonl.xz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return folder


def test_answers_from_an_exact_history_are_the_models_own(reader):
    ids = torch.randint(2, 28, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    read = reader.answer(ids[40:], 5, reader.compute(ids[:40]))
    whole = reader.answer(ids, 5, [(key[:0], value[:0]) for key, value in reader.compute(ids)])
    torch.testing.assert_close(read, whole, rtol=1e-4, atol=1e-4)
    assert read.exp().sum(-1) == pytest.approx([1.0] * 5, abs=1e-4)


def test_each_way_codes_its_own_tokens(limits, reader, dictionary):
    needles = torch.zeros(50, dtype=torch.bool)
    needles[20:24] = True
    text = limits.Text(None, reader.compute([2 + i % 26 for i in range(50)]), needles)
    codec = limits.DictionaryCodec(load_dictionary(dictionary), "cpu", 2, 2)
    far = torch.arange(50)
    far = (far >= 4) & (far < 40)
    for way, coded in (
        (limits.Way("exact"), far & False),
        (limits.Way("all", codec), far),
        (limits.Way("all but needles", codec, needles=False), far & ~needles),
        (limits.Way("needles", codec, others=False), far & needles),
    ):
        for old, new in zip(text.history, way.read(text, 4, 10), strict=True):
            for before, after in zip(old, new, strict=True):
                assert ((before != after).flatten(1).any(1) == coded).all(), way.name
    (key, value), (raw, _) = limits.Way("values", codec, ("value",)).read(text, 4, 10)[0], text.history[0]
    assert (key == raw).all() and (value != text.history[0][1]).any()


def test_water_filling_spends_all_bits(limits):
    variance = torch.tensor([4.0, 2.0, 1.0, 0.01])
    for bits in (0.5, 3.0, 20.0):
        lost = limits.water_filling(variance, bits)
        assert (lost <= variance).all()
        assert float((variance / lost).log2().sum() / 2) == pytest.approx(bits, rel=1e-3)
    assert limits.water_filling(torch.full((8,), 3.0), 8.0) == pytest.approx([0.75] * 8, rel=1e-3)


def test_an_ideal_code_loses_what_theory_says(limits, dictionary):
    loaded = load_dictionary(dictionary)
    generator = torch.Generator().manual_seed(1)
    widths = torch.linspace(0.1, 2.0, 16)
    vectors = torch.randn(4000, 1, 16, generator=generator) * widths
    codec = limits.IdealCodec(loaded, [[vectors, vectors]] * 2, 24.0, torch.device("cpu"))
    stretch = codec.stretch[0, 1]
    plain = (vectors - codec.means[0, 1]) / stretch
    variance = torch.linalg.eigvalsh(plain[:, 0].T @ plain[:, 0] / len(plain))
    lost = limits.water_filling(variance, 24.0)
    read = (codec.read_back(0, "value", vectors) - codec.means[0, 1]) / stretch
    # A gain of 1 stretches the projection by 1 / (1 - lost share): take it back.
    error = (read * (1 - lost.sum() / variance.sum()) - plain).square().sum(-1).mean()
    assert limits.GAINS["value"] == 1
    assert float(error) == pytest.approx(float(lost.sum()), rel=0.05)


def test_a_sentence_that_is_not_there_is_named(limits):
    assert limits.find([1, 2, 3, 4], [3, 4], "a key") == 2
    with pytest.raises(ValueError, match="'a key'"):
        limits.find([1, 2, 3, 4], [4, 3], "a key")


def test_every_way_has_its_row(limits, model, dictionary, data, tmp_path):
    options = f"--sparsity 3 --texts 1 --length {LENGTH} --device cpu".split()
    folders = ["--data", str(data), "--dictionary", str(dictionary), "--results", str(tmp_path)]
    limits.main([str(model), *folders, *options])
    rows = [json.loads(line) for line in (tmp_path / "needle_limits.jsonl").read_text().splitlines()]
    assert [row["case"]["way"] for row in rows] == [
        "exact", "sparsity 3", "sparsity 3, keys alone", "sparsity 3, values alone", "sparsity 3, all but needles",
        "sparsity 3, needles alone", "ideal, 64 bits",
    ]  # fmt: skip
    assert {row["case"]["questions"] for row in rows} == {4} and {row["peer_value"] for row in rows} == {
        rows[0]["value"]
    }
    losses = [row["case"]["first_loss"] for row in rows]
    assert len(set(losses)) == len(losses)  # each reads something else
    lost = [row["case"]["energy_lost"] for row in rows]
    assert [set(of_way) for of_way in lost[2:4]] == [{"key"}, {"value"}]  # of this way alone
    assert lost[2]["key"] == lost[1]["key"] and lost[5]["key"] != lost[1]["key"]
    energy = rows[1]["case"]["energy_lost"]
    assert 0 < energy["key"] < 1 and 0 < energy["value"] < 1
