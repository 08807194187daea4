"""Which sparsity loses less than a limit: what is shown, what the samples cannot tell, and what loses more."""

import json
import random

import numpy as np
import pytest

from vllm_lexico import cli
from vllm_lexico.evals.caches import parse_cache
from vllm_lexico.evals.folder import settle
from vllm_lexico.evals.identity import identities
from vllm_lexico.evals.measure import Measure
from vllm_lexico.evals.prediction_files import write_result
from vllm_lexico.evals.results.losses import loss_lines, loss_of, losses, paired_difference
from vllm_lexico.evals.results.statistics import estimate
from vllm_lexico.evals.results.summary import read_metrics, write_summary


def figure(own, reference, kind="share"):
    """A measure's figures, of answers one after the other."""
    measures = [Measure("qa", kind, dict(enumerate(values))) for values in (own, reference)]
    return {"metric": "qa", "kind": kind} | estimate(*measures)


def answers(right, lost, won, wrong):
    """Answers of a cache and of the reference: both right, one of them alone, and both wrong."""
    own = [1] * right + [0] * lost + [1] * won + [0] * wrong
    return own, [1] * right + [1] * lost + [0] * won + [0] * wrong


def metrics_of(*caches, task="qa", few=None):
    """Metrics of LEXICO's caches, (name, per cent of bytes, figure) each, and of a peer that is not one of them."""
    found = {"fp8": {"family": "fp8", "bytes_percent": 1.0, "tasks": {task: {"measures": [caches[0][2]]}}}}
    for name, bytes_percent, measured in caches:
        tasks = {task: {"measures": [measured | {"metric": task}]}}
        found[name] = {"family": "lexico", "bytes_percent": bytes_percent, "tasks": tasks}
    of_few = {} if few is None else {task: few}
    return {"reference": "bf16", "caches": found, "few_samples": of_few, "losses": losses(found, of_few)}


def test_lost_and_won_are_counted_over_common_samples():
    found = figure([1, 0, 0, 1, 1], [1, 1, 1, 0])
    assert (found["lost"], found["won"], found["count"]) == (2, 1, 5)
    alone = estimate(Measure("qa", "share", {0: 1}))
    assert alone["lost"] is None and alone["won"] is None
    assert figure([0.5, 1], [1, 0.5], "mean")["lost"] is None


def test_the_interval_of_a_difference_is_as_published():
    """Bonett and Price's formula by hand, 12 lost and 4 won of 100: 13/102 - 5/102 -+ 1.96 sqrt(0.170319 / 102)."""
    low, high = paired_difference(12, 4, 100)
    assert (low, high) == pytest.approx((-0.00166, 0.15852), abs=1e-5)
    assert paired_difference(0, 0, 150)[1] == pytest.approx(0.01824, abs=1e-5)


def test_the_bound_holds_as_often_as_it_says():
    """Samples of a cache that really loses 5 %: the bound is above in 97.5 % of them, or nearly."""
    generator, held = np.random.default_rng(0), 0
    for _ in range(400):
        lost, won, both, none = generator.multinomial(200, [0.06, 0.025, 0.64, 0.275])
        found = figure(*answers(both, lost, won, none))
        held += loss_of("lexico:15", 12.5, found)["most"] >= 5.0  # 0.035 of 0.7
    assert held >= 0.965 * 400


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr("vllm_lexico.evals.results.statistics.RESAMPLES", 500)


def test_the_smallest_that_is_shown_is_named():
    kept, some = figure(*answers(900, 2, 1, 97)), figure(*answers(860, 42, 1, 97))
    metrics = metrics_of(("lexico:7", 6.25, some), ("lexico:15", 12.5, kept), ("lexico:31", 25.0, kept))
    found = metrics["losses"]["qa"]
    assert [loss["cache"] for loss in found["caches"]] == ["lexico:7", "lexico:15", "lexico:31"]
    assert {limit: tuple(answer.values()) for limit, answer in found["answers"].items()} == {
        "1": ("shown", "lexico:15"), "3": ("shown", "lexico:15"), "10": ("shown", "lexico:7"),
    }  # fmt: skip
    head, line = loss_lines(metrics)
    assert "less than so much of bf16's" in head
    assert line == (
        "- qa (questions about long documents): 1 % and 3 %: lexico:15 (0.1 %, at most 0.6 %); "
        "10 %: lexico:7 (4.5 %, at most 6.0 %)"
    )


def test_what_the_samples_cannot_tell_is_not_shown():
    """Nothing lost of 60 samples, of which the reference has 40: not that less than 3 % are."""
    found = metrics_of(("lexico:15", 12.5, figure(*answers(40, 0, 0, 20))))
    line = loss_lines(found)[1]
    assert (
        "1 % and 3 %: not shown (best lexico:15: 0.0 %, at most 6.7 %); 10 %: lexico:15 (0.0 %, at most 6.7 %)" in line
    )


def test_what_loses_more_is_said_to():
    found = metrics_of(("lexico:7", 6.25, figure(*answers(300, 200, 5, 95))))
    assert "1 % and 3 % and 10 %: none of these (best lexico:7: 39.0 %, at most" in loss_lines(found)[1]
    assert {answer["state"] for answer in found["losses"]["qa"]["answers"].values()} == {"more"}


def test_few_samples_show_nothing():
    kept = figure(*answers(40, 0, 0, 5))
    found = metrics_of(("lexico:15", 12.5, kept), few=45)
    assert {answer["state"] for answer in found["losses"]["qa"]["answers"].values()} == {"not shown"}
    assert loss_lines(found)[1].endswith("; 45 samples are too few to show it")


def test_perplexity_loses_by_growing():
    generator = random.Random(0)
    base = [2 + generator.random() for _ in range(100)]
    worse = [loss + 0.02 + 0.001 * generator.random() for loss in base]
    measured = figure(worse, base, "perplexity")
    loss = loss_of("lexico:7", 6.25, measured)
    assert loss["loss"] == pytest.approx(2.07, abs=0.02) and loss["least"] < loss["loss"] < loss["most"] < 2.2
    line = loss_lines(metrics_of(("lexico:7", 6.25, measured), task="wikitext"))[1]
    assert line.startswith(
        "- wikitext (perplexity): 1 %: none of these (best lexico:7: 2.1 %, at most 2.1 %); 3 % and 10"
    )


def test_without_a_reference_nothing_is_said():
    alone = {"metric": "qa", "kind": "share"} | estimate(Measure("qa", "share", {0: 1, 1: 0}))
    never = figure([0] * 60, [0] * 60)
    for measured in (alone, never):
        metrics = metrics_of(("lexico:7", 6.25, measured))
        assert metrics["losses"] == {} and loss_lines(metrics) == []


def test_results_and_the_command_end_with_the_lines(settings, tmp_path, capsys, about):
    """Through files of predictions: what the folder's metrics have, and what the report ends with."""
    out, caches = tmp_path / "out", ("bf16", "lexico:15")
    asked = {name: identities(settings, parse_cache(name), ("pairs",)) for name in caches}
    settle(out, asked)
    for name in caches:
        rows = [{"id": str(i), "pairs": 75, "found": int(name == "bf16" or i >= 9)} for i in range(90)]
        facts = about(asked[name]["pairs"], 1000.0 if name == "bf16" else 125.0) | {
            "notes": ["pairs of 150 was left out"]
        }
        write_result(out / parse_cache(name).folder, "pairs", facts, rows)
    write_summary(out)
    found = read_metrics(out)["losses"]["pairs"]
    assert found["caches"][0]["loss"] == pytest.approx(10) and found["answers"]["10"]["state"] == "not shown"
    assert json.loads((out / "metrics.json").read_text())["losses"]["pairs"] == found
    assert cli.main(["eval", "--report", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "\n- pairs of 150 was left out.\n" in shown and "| 9 : 0 |" in shown
    assert shown.strip().splitlines()[-1].startswith("- pairs (exact strings from long texts): 1 % and 3 %: none of")
