"""Figures and intervals on cases worked by hand."""

import math

import numpy as np
import pytest

from vllm_lexico.evals.measure import Measure
from vllm_lexico.evals.results.statistics import estimate, wilson


def test_wilson_by_hand():
    # Share 0.5 of 10: centre 0.5, half-width 1.96 / (1 + 3.8415 / 10) * sqrt(0.025 + 3.8415 / 400)
    half = 1.959964 / 1.384146 * math.sqrt(0.025 + 3.841459 / 400)
    assert wilson(5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-6)
    low, high = wilson(10, 10)
    assert high == 1 and low == pytest.approx(10 / (10 + 3.841459), abs=1e-6)
    assert wilson(0, 10) == pytest.approx((0, 1 - low))


def test_a_ratio_is_taken_over_common_samples():
    own = Measure("m", "share", {i: int(i < 3) for i in range(6)})  # 3 of 6; of 0 to 3: 3 of 4
    found = estimate(own, Measure("m", "share", dict.fromkeys(range(4), 1)))
    assert (found["count"], found["value"], found["peer_value"], found["ratio"]) == (6, 0.5, 1, 0.75)
    assert found["ratio_low"] < 0.75 < found["ratio_high"] <= 1
    alone = estimate(own)
    assert alone["ratio"] is None and alone["low"] == found["low"]


def test_perplexity_is_paired():
    losses = {i: 2 + math.sin(i) for i in range(50)}  # windows differ much, the caches by 0.01 in each
    base, coded = (
        Measure("p", "perplexity", losses),
        Measure("p", "perplexity", {i: x + 0.01 for i, x in losses.items()}),
    )
    found = estimate(coded, base)
    assert found["value"] == pytest.approx(math.exp(sum(losses.values()) / 50 + 0.01))
    assert found["ratio"] == pytest.approx(math.exp(0.01))
    assert found["ratio_high"] - found["ratio_low"] < 1e-9 < 0.5 < found["high"] - found["low"]


def test_the_bootstrap_agrees_with_the_normal_interval():
    generator = np.random.default_rng(1)
    values = dict(enumerate(generator.normal(3, 1, 400)))
    found = estimate(Measure("m", "mean", values))
    half = 1.96 * np.std(list(values.values())) / 20
    assert found["high"] - found["value"] == pytest.approx(half, rel=0.15)
    assert found["value"] - found["low"] == pytest.approx(half, rel=0.15)


def test_clusters_widen_intervals():
    values = {i: int(i % 8 < 4) for i in range(80)}
    clusters = {i: i // 4 for i in values}  # four samples that are all right or all wrong
    alone, together = estimate(Measure("m", "share", values)), estimate(Measure("m", "share", values, clusters))
    assert together["value"] == alone["value"] == 0.5
    assert together["high"] - together["low"] == pytest.approx(2 * (alone["high"] - alone["low"]), rel=0.1)


def test_what_cannot_be_known_is_none():
    one = Measure("p", "perplexity", {0: 1.0})
    found = estimate(one, one)
    assert found["ratio"] == 1 and found["low"] is found["ratio_low"] is None
    never = Measure("m", "share", {0: 0, 1: 0})
    assert estimate(never, never)["ratio"] is None and estimate(never, never)["peer_value"] == 0
    assert estimate(never, Measure("m", "share", {7: 1}))["peer_value"] is None
