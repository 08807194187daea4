"""The study of settings: its points, what a tail holds, what codecs count, its rows, table and pictures; on the CPU."""

import csv
import json
import sys

import pytest
import torch

from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint

LAYERS = 12
LLAMA_8B = ModelFingerprint("llama", 32, 8, 128, 4096, "")


@pytest.fixture(scope="module")
def study(import_benchmark):
    return import_benchmark("quality_study")


@pytest.fixture(scope="module")
def points(study):
    return sys.modules["bench.study_points"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, write_letters_model):
    return write_letters_model(tmp_path_factory.mktemp("tiny"), layers=LAYERS)


@pytest.fixture(scope="module")
def dictionary(model, load_benchmark):
    return load_benchmark("bench/shapes").write_random_dictionary(model, atoms=64)


def test_finer_layers_cost_the_others_as_much(points):
    assert points.budget(8, (7,), 7) == [5, 6, 6, 6, 6, 6, 6, 15]
    assert points.budget(4, (), 15) == [15] * 4
    for layers, finer, mean in ((28, (0, 1, 26, 27), 7), (28, (25,), 15), (24, (0, 1), 15)):
        atoms = points.budget(layers, finer, mean)
        others = [size for layer, size in enumerate(atoms) if layer not in finer]
        assert sum(atoms) == layers * mean and max(others) - min(others) <= 1
        assert [atoms[layer] for layer in finer] == [mean + 8] * len(finer)
    for layers, finer in ((2, (0, 1)), (4, (4,)), (4, (0, 1, 2))):
        with pytest.raises(ValueError, match="allowed"):
            points.budget(layers, finer, 7)


def test_points_turn_one_setting_each(points):
    setup = points.Setup(28, (25,), ("given", "books"))
    made = {name: points.STUDIES[name](setup) for name in points.STUDIES}
    assert len({(p.study, p.series, p.name) for own in made.values() for p in own}) == sum(map(len, made.values()))
    means = {sum(map(sum, p.coding.sparsity)) / 56 for name in ("layers", "key_value") for p in made[name]}
    assert means == {7, 15}
    only_values = next(p for p in made["layers"] if p.series == "S = 7" and p.name == "V of layer 25")
    assert only_values.coding.sparsity[25] == (7, 15) and only_values.coding.sparsity[0] == (7, 6)
    assert {p.coding for p in made["window"] if p.x == 128} <= {p.coding for p in made["sparsity"]}
    assert {p.coding.dictionary for p in made["dictionary"]} == {"given", "books"}


def test_a_tail_holds_what_the_engine_held(study, root):
    """Rows that `benchmarks/held.py` measured in a running engine."""
    pytest.importorskip("vllm")
    held_bytes = sys.modules["bench.tail_cost"].held_bytes
    rows = [json.loads(line) for line in (root / "benchmarks/results/engine.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["metric"] == "held_bytes_a_layer" and row["case"]["tokens"] <= 4096]
    assert rows
    for row in rows:
        S, tokens = row["case"]["sparsity"], row["case"]["tokens"]
        assert held_bytes(LLAMA_8B, (S, S), 128, 16, 128, tokens) == row["value"]
    assert held_bytes(LLAMA_8B, (15, 15), 0, 16, 128, 1024) == held_bytes(LLAMA_8B, (15, 15), 32, 16, 128, 1024)


@pytest.mark.parametrize("count", [1, 7, 300])
def test_atoms_are_counted_as_they_are_stored(study, dictionary, count):
    from lexico_kernels import reference
    from lexico_kernels.memory.layout import CodeLayout

    loaded = load_dictionary(dictionary)
    vectors = torch.randn(count, 1, 16, generator=torch.Generator().manual_seed(count))
    for error in (0.0, 0.5):
        codec = study.CountingCodec(loaded, "cpu", 5, 5, relative_error=error)
        codec(3, "value", torch.randn(400, 1, 16))  # what stays in the pages must not count
        codec.used, codec.coded = 0, 0
        codec(3, "value", vectors)
        book = loaded.codebook(3, "value", 5)
        records = reference.encode_heads(vectors, book, CodeLayout(16, 1, 5, 5), "value", error)
        entries = records.flatten(0, 1).view(torch.int16)[:, 1:]
        middle = entries[count // 2 : count // 2 + 1] if count % 2 else entries[:0]  # coded twice
        stored = torch.cat((entries, middle)) & -16
        assert codec.mean_atoms() == pytest.approx((stored != 0).sum().item() / len(stored))
    assert 0 < codec.mean_atoms() < 5 and codec.mean_bytes() == pytest.approx(2 + 2 * codec.mean_atoms())


def test_a_codec_by_layer_is_each_layers_own(study, points, dictionary):
    loaded, vectors = load_dictionary(dictionary), torch.randn(40, 1, 16)
    coding = points.Coding(((7, 5),) * 3 + ((3, 3),) + ((7, 5),) * 4)
    codec = study.make_codec(coding, loaded, "cpu")
    for layer, sparsity in ((0, 7), (3, 3)):
        alone = study.DictionaryCodec(loaded, "cpu", sparsity, sparsity)
        assert torch.equal(codec(layer, "key", vectors), alone(layer, "key", vectors))
    assert codec.vector_bytes == {"key": 2 * (1 + (7 * 7 + 3) / 8), "value": 2 * (1 + (7 * 5 + 3) / 8)}


@pytest.fixture
def command(study, points, model, dictionary, tmp_path, monkeypatch):
    """Run the script on a short text with few points; returns its rows."""
    (tmp_path / study.WIKITEXT.removesuffix(".xz")).write_text("the quick brown fox jumps over the lazy dog " * 5)
    monkeypatch.setattr(study, "WIKITEXT", study.WIKITEXT.removesuffix(".xz"))
    monkeypatch.setattr(points, "SPARSITIES", (3, 7))
    monkeypatch.setattr(points, "BASES", (7,))
    monkeypatch.setattr(points, "ERRORS", (0.0, 0.5))
    monkeypatch.setattr(points, "LIMITS", (7,))

    def run(*studies, more=()):
        given = [str(model), "--data", str(tmp_path), "--dictionary", str(dictionary), "--out", str(tmp_path / "out")]
        given += ["--windows", "1", "--length", "170", "--skip", "150", "--device", "cpu"]
        given += ["--results", str(tmp_path / "results"), "--studies", *studies, *more]
        assert study.run(study.parse_args(given)) == 0
        return [json.loads(line) for line in (tmp_path / "results" / "quality.jsonl").read_text().splitlines()]

    return run


def test_the_script_measures_each_coding_once_and_goes_on(command, study, points, dictionary, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(study, "find_commit", lambda root: "abc")
    monkeypatch.setattr(sys.modules["bench.record"], "find_commit", lambda root: "abc")
    calls = []
    read = study.CodedPerplexity.negative_log_likelihood
    monkeypatch.setattr(
        study.CodedPerplexity,
        "negative_log_likelihood",
        lambda self, windows, codec, batch: calls.append(codec) or read(self, windows, codec, batch),
    )
    more = ("--more-dictionaries", f"books={dictionary}", "--worst-layers", "5", "--separate")
    rows = command("sparsity", "layers", "error", "dictionary", more=more)
    assert [row["case"]["study"] for row in rows] == ["sparsity"] * 2 + ["layers"] * 6 + ["error"] * 2 + [
        "dictionary"
    ] * 2
    assert len(calls) == 1 + len({json.dumps(row["case"]["by_layer"]) for row in rows}) + 3  # S = 3, error, books
    by_name = {(row["case"]["study"], row["case"]["name"]): row for row in rows}
    same = [
        by_name["sparsity", "7"],
        by_name["layers", "all alike"],
        by_name["error", "0"],
        by_name["dictionary", "books"],
    ]
    assert len({row["value"] for row in same}) == 1 and same[0]["case"]["bytes_percent"] == 50.0
    assert by_name["sparsity", "3"]["value"] != same[0]["value"]
    first = rows[0]
    assert (first["metric"], first["peer"], first["ratio"]) == ("perplexity_ratio", "float32", first["value"])
    ratio = first["case"]["perplexity"] / first["case"]["uncoded_perplexity"]
    assert first["value"] == pytest.approx(ratio, rel=1e-4) and first["case"]["ratio_95_percent"] is None
    stopped = by_name["error", "0.5"]["case"]
    assert stopped["used_percent"] < stopped["bytes_percent"] and stopped["mean_atoms"] < 7
    lines = list(csv.DictReader((tmp_path / "out" / "study.csv").open()))
    assert [line["name"] for line in lines] == [row["case"]["name"] for row in rows]
    pictures = sorted(path.stem for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["study", "study_dictionary", "study_error", "study_layers", "study_sparsity"]
    calls.clear()
    (tmp_path / "out" / "study.png").unlink()
    again = command("sparsity", "layers", "error", "dictionary", more=more)
    assert again == rows and not calls and (tmp_path / "out" / "study.png").exists()
    monkeypatch.setattr(points, "SPARSITIES", (3, 5, 7))
    assert len(command("sparsity")) == len(rows) + 1 and len(calls) == 2  # the model as it is, and the new point


def test_windows_and_sinks_say_what_they_cost(command, points, monkeypatch):
    pytest.importorskip("vllm")
    monkeypatch.setattr(points, "WINDOWS", (0, 32, 128))
    monkeypatch.setattr(points, "SINKS", (0, 16))
    rows = [row["case"] for row in command("window", "sinks")]
    held = [case["held_percent"] for case in rows]
    assert held[0] == held[1] and held[1]["128"] < held[2]["128"] and held[3]["64"] < held[4]["64"]
    assert rows[0]["perplexity"] != rows[1]["perplexity"] and rows[4]["perplexity"] == rows[2]["perplexity"]


@pytest.mark.parametrize(
    ("studies", "more", "message"),
    [
        (("sparsity", "speed"), (), "studies .*speed.* allowed: sparsity"),
        (("sparsity",), ("--more-dictionaries", "books"), "NAME=FILE"),
        (("sparsity",), ("--more-dictionaries", "given=a.safetensors"), "each name once"),
        (("sparsity",), ("--length", "100"), "--length 100 is all read raw"),
        (("layers",), ("--worst-layers", "12"), "few of layers 0 to 11"),
    ],
)
def test_what_cannot_be_measured_is_refused(command, studies, more, message):
    with pytest.raises(ValueError, match=message):
        command(*studies, more=more)
