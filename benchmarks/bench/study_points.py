"""What `quality_study.py` measures: the points of each study, one setting turned at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from vllm_lexico.dictionary.file import GAINS

SPARSITIES = (3, 5, 7, 9, 11, 13, 15, 19, 23, 31)
BASES = (15, 7)  # atoms a vector where something else is turned: 12.5 and 6.25 % of bf16 at D = 128
WINDOWS = (0, 32, 64, 128, 256)
SINKS = (0, 16, 64)
SHIFTS = {15: (-6, -4, -2, 0, 2, 4, 6), 7: (-4, -2, 0, 2, 4)}  # atoms that keys have more than the mean, values less
FINER = 8  # atoms more of a layer that is kept finer
ERRORS = (0.0, 0.1, 0.2, 0.3, 0.4)
GAIN_PAIRS = ((0.0, 0.0), (0.375, 0.0), (0.0, 1.0), (0.375, 0.5), (0.375, 1.0), (0.5, 1.0), (1.0, 1.0))
LIMITS = (31, 15)  # atoms at most, with an error threshold
OWN = "given"  # the name of --dictionary


@dataclass(frozen=True)
class Coding:
    """How a cache keeps tokens.

    sparsity: atoms of keys and values, a pair for each layer. window, sinks, relative_error: the product's settings.
    dictionary: its name. gains: of keys and values, see `Codebook`.
    """

    sparsity: tuple[tuple[int, int], ...]
    window: int = 128
    sinks: int = 16
    relative_error: float = 0.0
    dictionary: str = OWN
    gains: tuple[float, float] = (GAINS["key"], GAINS["value"])


@dataclass(frozen=True)
class Point:
    """One row of a study.

    series: the points that a line joins. name: what is turned, in words. x: the same as a number; where in a panel of
    names, or what the panel's axis does not take from the measurement.
    """

    study: str
    series: str
    name: str
    x: float
    coding: Coding


@dataclass(frozen=True)
class Setup:
    """What points are made for. worst: layers, from 0, known to do most of the damage. dictionaries: by their names."""

    layers: int
    worst: tuple[int, ...] = ()
    dictionaries: tuple[str, ...] = (OWN,)

    def even(self, key: int, value: int | None = None) -> Coding:
        """The same in every layer."""
        return Coding(((key, key if value is None else value),) * self.layers)


def sparsity_points(setup: Setup) -> list[Point]:
    """Memory against quality: the dial."""
    return [Point("sparsity", "fixed S", f"{S}", S, setup.even(S)) for S in SPARSITIES]


def window_points(setup: Setup) -> list[Point]:
    """Newest tokens in full precision."""
    turned = [(S, window) for S in BASES for window in WINDOWS]
    return [
        Point("window", f"S = {S}", f"{window}", window, replace(setup.even(S), window=window)) for S, window in turned
    ]


def sinks_points(setup: Setup) -> list[Point]:
    """First tokens in full precision."""
    turned = [(S, sinks) for S in BASES for sinks in SINKS]
    return [Point("sinks", f"S = {S}", f"{sinks}", sinks, replace(setup.even(S), sinks=sinks)) for S, sinks in turned]


def key_value_points(setup: Setup) -> list[Point]:
    """Atoms moved from values to keys; x is the keys' share in percent."""
    turned = [(S, S + shift, S - shift) for S in BASES for shift in SHIFTS[S]]
    return [
        Point("key_value", f"{2 * S} atoms", f"{key}/{value}", 50 * key / S, setup.even(key, value))
        for S, key, value in turned
    ]


def layers_points(setup: Setup) -> list[Point]:
    """Some layers kept finer, and the others coarser by as many atoms."""
    last = setup.layers - 2
    kept: dict[str, tuple[tuple[int, ...], bool]] = {  # layers, and whether keys too
        "all alike": ((), True),
        "first 2": ((0, 1), True),
        "last 2": ((last, last + 1), True),
        "first 2, last 2": ((0, 1, last, last + 1), True),
    }
    if setup.worst:
        numbers = ", ".join(map(str, setup.worst))
        kept |= {f"layer {numbers}": (setup.worst, True), f"V of layer {numbers}": (setup.worst, False)}
    made = []
    for S in BASES:
        for at, (name, (layers, keys_too)) in enumerate(kept.items()):
            values = budget(setup.layers, layers, S)
            keys = budget(setup.layers, layers if keys_too else (), S)
            made.append(Point("layers", f"S = {S}", name, at, Coding(tuple(zip(keys, values, strict=True)))))
    return made


def dictionary_points(setup: Setup) -> list[Point]:
    """Other dictionaries: other N, other text."""
    turned = [(S, at, name) for S in BASES for at, name in enumerate(setup.dictionaries)]
    return [
        Point("dictionary", f"S = {S}", name, at, replace(setup.even(S), dictionary=name)) for S, at, name in turned
    ]


def gain_points(setup: Setup) -> list[Point]:
    """Codes made longer than the pursuit leaves them."""
    turned = [(S, at, gains) for S in BASES for at, gains in enumerate(GAIN_PAIRS)]
    return [
        Point("gain", f"S = {S}", f"K {key:g}, V {value:g}", at, replace(setup.even(S), gains=(key, value)))
        for S, at, (key, value) in turned
    ]


def error_points(setup: Setup) -> list[Point]:
    """A pursuit that stops at a relative error."""
    turned = [(limit, error) for limit in LIMITS for error in ERRORS]
    return [
        Point("error", f"S <= {limit}", f"{error:g}", error, replace(setup.even(limit), relative_error=error))
        for limit, error in turned
    ]


STUDIES: dict[str, Callable[[Setup], list[Point]]] = {
    "sparsity": sparsity_points,
    "window": window_points,
    "gain": gain_points,
    "layers": layers_points,
    "key_value": key_value_points,
    "error": error_points,
    "sinks": sinks_points,
    "dictionary": dictionary_points,
}
TAIL_STUDIES = ("window", "sinks")  # what they turn costs a request a fixed amount


def budget(layers: int, finer: Collection[int], mean: int) -> list[int]:
    """Atoms of each layer, `mean` on average: FINER more for some, the others as even as whole atoms can be.

    ValueError where too few layers are left to pay for it.
    """
    others = [layer for layer in range(layers) if layer not in finer]
    left = layers * mean - len(finer) * (mean + FINER)
    if left < len(others) or not others or not all(0 <= layer < layers for layer in finer):
        raise ValueError(
            f"layers {sorted(finer)} of {layers} cannot have {FINER} atoms more than {mean} at equal bytes; allowed: "
            f"few of layers 0 to {layers - 1}; name others, or leave the study `layers` out"
        )
    atoms = dict.fromkeys(finer, mean + FINER)
    for at, layer in enumerate(others):
        atoms[layer] = (at + 1) * left // len(others) - at * left // len(others)
    return [atoms[layer] for layer in range(layers)]
