"""Layers of unlike heads that are timed are right: small ones, by the twins."""

from dataclasses import replace

import pytest

pytest.importorskip("vllm")


def _clock(call):
    call()
    return 1.0


@pytest.fixture
def small(import_benchmark, monkeypatch):
    """The module, with small dictionaries, and a clock that only calls."""
    speed = import_benchmark("uneven_speed")
    from bench import omp_vectors

    monkeypatch.setattr(speed.decode, "ATOMS", 64)
    monkeypatch.setattr(omp_vectors, "PLANTED_ATOMS", 64)
    for module, name in ((speed, "milliseconds"), (speed.decode, "graph_ms")):
        monkeypatch.setattr(module, name, _clock)
    return speed


def shrunk(case):
    """Four heads of 16 numbers; counts of heads are halved."""
    counts = (1, 3) if len(case.layers[0]) > 1 else (4,)
    layers = tuple(
        tuple(part._replace(number=count) for part, count in zip(parts, counts, strict=True))
        for parts in case.layers[:2]
    )
    sizes = {"batch": 2, "context": 700, "coded_tokens": 130, "kv_heads": 4, "heads": 8, "head_dim": 16}
    return replace(case, layers=layers, **sizes)


@pytest.mark.parametrize("index", (1, 3, 6))
def test_cases_are_right_before_they_are_timed(small, index, capsys):
    case = shrunk(small.CASES[index])
    assert small.run_decode(case, keep=False, device="cpu")
    assert small.run_coding(case, keep=False, device="cpu")
    assert "uneven_code_layers_ms" in capsys.readouterr().out


def test_layers_of_unlike_bytes_are_coded_together_as_in_an_engine(small):
    case = shrunk(small.CASES[0])
    low, high = case.layers[0][1], case.layers[0][0]
    case = replace(case, layers=((high._replace(number=1), low._replace(number=3)), (high._replace(number=2),) * 2))
    layers = small.coded_layers(case, "cpu")
    small.span_coder(layers)()
    for layer in layers:
        for part in layer.parts.parts:
            assert part.cache.code_pages[1].any(), "nothing was coded"


def test_heads_in_a_wrong_order_are_not_right(small, capsys):
    case = shrunk(small.CASES[1])
    (layer, _), order = small.decode_layers(case, "cpu"), case.order("cpu")
    assert layer.error() < 6e-3
    other = replace(layer, parts=replace(layer.parts, order=replace(order, heads=order.heads.flip(0))))
    assert other.error() > 0.1


def test_cases_have_the_bytes_that_they_say(small):
    assert [case.bytes_ratio for case in small.CASES] == [1, 1, 1.0625, 1, 1, 0.875, 1]
