"""metrics.json, the CSV, the picture, the tables and recorded rows of a folder of results."""

import csv
import math
import sys
from pathlib import Path

import pytest

from vllm_lexico import cli
from vllm_lexico.evals.caches import Cache
from vllm_lexico.evals.folder import write_cache
from vllm_lexico.evals.results.frontier import points
from vllm_lexico.evals.results.summary import COLUMNS, read_metrics, write_summary
from vllm_lexico.evals.results.tables import dominating, report

CACHES = (("bf16", 1.0, 1000.0), ("lexico:15", 0.8, 125.0), ("lexico:7", 0.4, 62.5), ("turboquant_3bit_nc", 0.5, 250.0))


def measures(metrics, cache, task):
    return {measure["metric"]: measure for measure in metrics["caches"][cache]["tasks"][task]["measures"]}


def test_metrics(make_results):
    metrics = write_summary(make_results(*CACHES))
    assert list(metrics["caches"]) == ["bf16", "turboquant_3bit_nc", "lexico:15", "lexico:7"]
    assert metrics["caches"]["lexico:15"]["bytes_percent"] == 12.5
    solved = measures(metrics, "lexico:15", "gsm8k")
    assert solved["gsm8k"]["value"] == solved["gsm8k"]["ratio"] == 0.8 and solved["gsm8k"]["count"] == 20
    assert solved["agreement_tokens"]["value"] == pytest.approx(0.8 * 4 + 0.2 * 2)
    assert solved["agreement"]["value"] == pytest.approx(0.9)
    assert measures(metrics, "lexico:7", "wikitext")["wikitext"]["ratio"] == pytest.approx(math.exp(0.06))
    needle = measures(metrics, "lexico:15", "needle")
    assert needle["needle"]["held_percent"] == 30 and needle["needle_300"]["held_percent"] == 50
    assert needle["needle_600"]["case"] == {"length": 600}


def test_csv_has_every_figure(make_results):
    out = make_results(*CACHES)
    write_summary(out)
    with (out / "frontier.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    [row] = [row for row in rows if row["cache"] == "lexico:15" and row["metric"] == "gsm8k"]
    assert (float(row["value"]), float(row["bytes_percent"]), float(row["held_percent"])) == (0.8, 12.5, 30)
    assert len(rows) == 4 * (4 + 1 + 7)


def test_picture(make_results, tmp_path):
    pytest.importorskip("matplotlib")
    out = make_results(*CACHES)
    metrics = write_summary(out)
    content = (out / "frontier.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 20_000
    shown = points(metrics, "wikitext")
    assert set(shown) == {"bf16", "lexico", "turboquant"} and len(shown["lexico"]) == 2
    assert shown["bf16"][0]["y"] == 1 and shown["lexico"][0]["x"] == 12.5


def test_without_matplotlib_the_figures_still_come(make_results, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    out = make_results(*CACHES)
    write_summary(out)
    assert (out / "metrics.json").exists() and not (out / "frontier.png").exists()
    assert "no picture: drawing needs matplotlib" in capsys.readouterr().err


def test_without_bf16_there_are_figures_but_no_ratios(make_results):
    metrics = write_summary(make_results(*CACHES[1:2]))
    solved = measures(metrics, "lexico:15", "gsm8k")
    assert set(solved) == {"gsm8k", "gsm8k_flexible"} and solved["gsm8k"]["ratio"] is None
    assert points(metrics, "wikitext") == {}
    assert "| `lexico:15` | 125 | 12.50 | 0.800 (" in report(metrics)


def test_a_better_cache_of_fewer_bytes_is_named(make_results):
    better = [("turboquant_3bit_nc", 0.5, 60.0), ("fp8", 0.9, 500.0)]
    metrics = write_summary(make_results(*CACHES[:3], *better))
    found = list(dominating(metrics))
    assert {words.split(":")[0] for words in found} == {"gsm8k", "wikitext", "needle", "agreement_tokens"}
    assert all("`turboquant_3bit_nc` (6.00 %)" in words and "`lexico:7` (6.25 %)" in words for words in found)
    assert not list(dominating(write_summary(make_results(*CACHES))))


def test_report(make_results, capsys):
    out = make_results(*CACHES)
    write_cache(out, Cache("fp8", {"kv_cache_dtype": "fp8"}))
    (out / "fp8" / "gsm8k.error").write_text("a log\nValueError: not here\n")
    write_summary(out)
    assert cli.main(["eval", "--report", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "| `lexico:15` | 125 | 12.50 | 0.800 (0.584 to 0.919), 0.800 of bf16 | 1.0202 (" in shown
    assert "### needle_300\n" in shown and "- fp8, gsm8k: `ValueError: not here`" in shown
    assert cli.main(["eval", "--report", str(out / "none")]) == 2
    assert "has no metrics.json" in capsys.readouterr().err


def test_rows_are_recorded_once(make_results, tmp_path, load_benchmark, root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    quality, out = load_benchmark("quality"), make_results(*CACHES[:2])
    write_summary(out)
    rows = quality.record_rows(out, tmp_path / "results")
    assert len(rows) == 2 * (4 + 1 + 3) and quality.record_rows(out, tmp_path / "results") == []
    of_lexico = [row for row in rows if row["case"]["cache"] == "lexico:15"]
    needles = [row for row in of_lexico if row["metric"] == "needle"]
    [row] = [row for row in needles if row["case"].get("length") == 300]
    assert row["peer"] == "bf16" and row["case"]["bytes_percent"] == 12.5 and row["ratio"] == row["value"]
    [row] = [row for row in of_lexico if row["metric"] == "gsm8k"]
    assert (row["value"], row["peer_value"], row["ratio"]) == (0.8, 1.0, 0.8)
    assert row["case"]["settings"] == {"shots": 5, "limit": None} and row["case"]["model"] == "model"
    assert len((tmp_path / "results" / "quality.jsonl").read_text().splitlines()) == len(rows)


def test_few_samples_are_said_in_results_and_in_words(make_results, capsys, monkeypatch):
    out = make_results(*CACHES)
    write_summary(out)
    assert read_metrics(out)["few_samples"] == {"gsm8k": 20, "wikitext": 20, "needle": 20}
    assert cli.main(["eval", "--report", str(out)]) == 0
    said = "Few samples (gsm8k 20, wikitext 20, needle 20): these figures show what is broken"
    assert said in capsys.readouterr().out
    monkeypatch.setattr("vllm_lexico.evals.results.summary.FEW_SAMPLES", 20)
    write_summary(out)
    assert read_metrics(out)["few_samples"] == {} and "Few samples" not in report(read_metrics(out))


def test_where_all_results_are_missing_there_is_no_table(make_results, settings, capsys, monkeypatch):
    out = make_results(("bf16", 1, 1000.0), tasks=("gsm8k",))
    (out / "bf16" / "gsm8k.json").unlink()
    (out / "bf16" / "gsm8k.error").write_text("RuntimeError: no memory\n")
    write_summary(out)
    monkeypatch.setattr("vllm_lexico.check.source.config_folder", Path)
    monkeypatch.setattr("vllm_lexico.evals.run.run_evaluation", lambda *_, **__: {"bf16 gsm8k": "no memory"})
    asked = ["--out", str(out), "--data", settings.data, "--caches", "bf16", "--tasks", "gsm8k"]
    assert cli.main(["eval", settings.model, *asked]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "1 of 1 results are missing: bf16 gsm8k" in said.err
    assert cli.main(["eval", "--report", str(out)]) == 0
    words = capsys.readouterr().out
    assert (
        "|" not in words
        and "\n\nNo cache has a result.\n\n### Failed\n\n- bf16, gsm8k: `RuntimeError: no memory`" in words
    )
    make_results(("bf16", 1, 1000.0), tasks=("gsm8k",))
    write_summary(out)
    assert cli.main(["eval", settings.model, *asked]) == 2
    assert "| `bf16` | 1,000 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "MODEL is missing"),
        (["m", "--data", "d"], "--out is missing"),
        (["m", "--data", "d", "--out", "o", "--tasks", "chess"], "--tasks was given as 'chess'"),
        (["m", "--data", "d", "--out", "o", "--caches", "lexico"], "how many atoms"),
        (["m", "--data", "d", "--out", "o", "--engine-arguments", "[]"], "no JSON object"),
        (["m", "--data", "d", "--out", "o", "--engine-arguments", "[" * 100_000], "no JSON object"),
        (["m", "--data", "d", "--out", "o", "--engine-arguments", '{"a": 1e999}'], "no JSON object"),
        (["m", "--data", "d", "--out", "o", "--parallel", "0"], "--parallel was given as 0"),
        (["m", "--data", "d", "--out", "o", "--timeout", "nan"], "--timeout was given as nan"),
        (["m", "--data", "d", "--out", "o", "--timeout", "0"], "--timeout was given as 0"),
        (["m", "--data", "d", "--out", ""], "--out is missing"),
        (["", "--data", "d", "--out", "o"], "MODEL is missing"),
    ],
)
def test_mistakes_on_the_command_line(options, words, capsys):
    assert cli.main(["eval", *options]) == 2
    assert words in capsys.readouterr().err
