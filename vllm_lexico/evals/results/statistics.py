"""Estimates with 95 % intervals: shares, means, perplexities and ratios to another cache's over the same samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from vllm_lexico.evals.measure import Measure

RESAMPLES = 4000
Z95 = 1.959964
Pairs = np.ndarray  # float64 [clusters, 3]: samples, their sum, and the reference's sum


def wilson(successes: float, count: int) -> tuple[float, float]:
    """The Wilson score interval of a share, which stays within 0 and 1 and is right for shares of 0 and 1 too."""
    share, z2 = successes / count, Z95**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    # Where all or none succeed the bound is the share itself, but for rounding.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


def estimate(measure: Measure, reference: Measure | None = None) -> dict[str, Any]:
    """The figure with its interval and, where a reference is given, its ratio to the reference's over common samples.

    Intervals of shares are Wilson's, counting clusters; all others come from resampling clusters, for ratios of both
    caches together.

    Args:
        measure: with one sample at least.
        reference: the same measure of the cache that this one is compared with.

    Returns:
        count, value, low, high, peer_value, ratio, ratio_low, ratio_high, and of shares lost and won: samples that the
        reference alone has right, and those that it alone has wrong. None for what cannot be known: an interval of a
        single sample, a ratio to nothing.
    """
    alone = _pairs(measure, measure)
    value = float(_figure(measure.kind)(alone.sum(0)[1] / alone.sum(0)[0]))
    low: float | None
    high: float | None
    if measure.kind == "share":
        # As if a cluster's samples were one: too wide rather than too narrow, and no point where all succeed.
        low, high = wilson(value * len(alone), len(alone))
    else:
        low, high = _interval(alone, lambda sums: _figure(measure.kind)(sums[:, 1] / sums[:, 0]))
    found = {"count": len(measure.values), "value": value, "low": low, "high": high}
    unknown = dict.fromkeys(("peer_value", "ratio", "ratio_low", "ratio_high", "lost", "won"))
    return found | unknown | _ratio(measure, reference) | _in_pairs(measure, reference)


def _in_pairs(measure: Measure, reference: Measure | None) -> dict[str, Any]:
    """How many samples each of the two alone has right."""
    if reference is None or measure.kind != "share":
        return {}
    pairs = [(value, reference.values[at]) for at, value in measure.values.items() if at in reference.values]
    return {"lost": sum(own < other for own, other in pairs), "won": sum(own > other for own, other in pairs)}


def _ratio(measure: Measure, reference: Measure | None) -> dict[str, Any]:
    pairs = _pairs(measure, reference) if reference is not None else np.empty((0, 3))
    if not len(pairs):
        return {}
    count, own, other = pairs.sum(0)
    figure = _figure(measure.kind)
    peer = float(figure(other / count))
    if not peer:
        return {"peer_value": peer}

    def ratios(sums: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return figure(sums[:, 1] / sums[:, 0]) / figure(sums[:, 2] / sums[:, 0])

    low, high = _interval(pairs, ratios)
    return {
        "peer_value": peer,
        "ratio": float(figure(own / count)) / peer,
        "ratio_low": low,
        "ratio_high": high,
    }


def _figure(kind: str) -> Callable[[Any], Any]:
    return np.exp if kind == "perplexity" else lambda mean: mean


def _pairs(measure: Measure, reference: Measure) -> Pairs:
    """Sums over the clusters of samples that both have."""
    clusters: dict[Hashable, list[float]] = {}
    for sample, value in measure.values.items():
        if sample in reference.values:
            sums = clusters.setdefault(measure.clusters.get(sample, ("alone", sample)), [0.0, 0.0, 0.0])
            for i, number in enumerate((1.0, value, reference.values[sample])):
                sums[i] += number
    return np.array(list(clusters.values()), dtype=np.float64).reshape(-1, 3)


def _interval(pairs: Pairs, figures: Callable[[np.ndarray], np.ndarray]) -> tuple[float | None, float | None]:
    """Percentile bootstrap over clusters; the same seed every time, so that a table can be repeated."""
    if len(pairs) < 2:
        return None, None
    generator = np.random.default_rng(0)
    # As many draws of each cluster as a multinomial gives: the same as drawing clusters, in one product.
    draws = generator.multinomial(len(pairs), np.full(len(pairs), 1 / len(pairs)), size=RESAMPLES)
    drawn = figures(draws @ pairs)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return None, None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)
