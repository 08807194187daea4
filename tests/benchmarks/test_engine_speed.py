"""What the speed benchmark makes of its engines' results; the engines themselves need a GPU to say anything."""

import json
import os
import sys
import types

import pytest
import torch
from lexico_kernels import CodeLayout, LayerStack
from lexico_kernels.memory.records import scale_view
from lexico_kernels.testing import entries_at, poisoned_cache


@pytest.fixture(scope="module")
def speed(load_benchmark, root):
    sys.path.insert(0, str(root / "benchmarks"))  # where a script finds its neighbours
    try:
        return load_benchmark("engine_speed")
    finally:
        sys.path.remove(str(root / "benchmarks"))


def decode_numbers(median, p99, mean, tokens_per_second):
    return {"median_ms": median, "p99_ms": p99, "mean_ms": mean, "tokens_per_second": tokens_per_second}


def test_rows_compare_each_engine_with_its_peers(speed):
    steady = decode_numbers(10.0, 12.0, 10.0, 6400.0)
    results = {
        "LEXICO-15": {"ttft": {"seconds": 0.3}, "steady": {"aligned": steady, "fill_tokens_per_second": 1.0}},
        "FLASH_ATTN": {"ttft": {"seconds": 0.2}, "prefill": {"seconds": 1.0}, "starved": {"2": {}}},
        "LEXICO-15-uncoded": {
            "prefill": {"seconds": 1.1},
            "steady": {"aligned": decode_numbers(9.0, 9.0, 9.0, 7000.0), "fill_tokens_per_second": 2.0},
        },
        "LEXICO-7": {},  # did not start
    }
    rows = {metric: (case, value, peer) for case, metric, value, peer, _ in speed.rows(results, {}, 1, 4)}
    assert rows["ttft_ratio"][1:] == (pytest.approx(1.5), "FLASH_ATTN")
    assert rows["ttft_ratio"][0]["bytes_percent"] == 12.5 and rows["ttft_ratio"][0]["coding"]
    assert rows["prefill_ratio"][1] == pytest.approx(1.1) and not rows["prefill_ratio"][0]["coding"]
    assert rows["coding_share"][1] == pytest.approx(0.1)
    assert rows["inter_token_p99_over_median"][1] == pytest.approx(1.2)
    assert set(rows) == {
        "ttft_ratio", "prefill_ratio", "coding_share", "inter_token_p99_over_median", "decode_tokens_per_second",
    }  # fmt: skip


def test_rows_of_decode_and_starved_name_both_peers(speed):
    def engine(rate):
        turn = {"tokens_per_second": rate, "seconds": 1.0}
        return {"decode": {"spread": decode_numbers(1.0, 1.0, 1.0, rate)}, "starved": {"1": turn, "2": turn}}

    results = {"FLASH_ATTN": engine(100.0), "fp8": engine(200.0), "LEXICO-15": engine(400.0)}
    ratios = {
        (metric, case.get("turn"), peer): value / peer_value
        for case, metric, value, peer, peer_value in speed.rows(results, {}, 1, 4)
        if "bytes_percent" in case
    }
    for metric, turn in (("decode_tokens_per_second", None), ("output_tokens_per_second", 2)):
        assert ratios[metric, turn, "FLASH_ATTN"] == 4.0 and ratios[metric, turn, "fp8"] == 2.0


def options(speed, folder, *words):
    """What the command line's defaults are to `Measured`, and to `planned` with other words."""
    return types.SimpleNamespace(
        logs=folder, results=folder, resume="--resume" in words, shrink=1, peer="FLASH_ATTN",
        measure=list(speed.MEASURES), engines=list(speed.ENGINES), steps=16, answer_tokens=128, turns=2,
    )  # fmt: skip


def test_rows_are_written_once_and_as_soon_as_they_can_be(speed, tmp_path):
    def written():
        path = tmp_path / "engine.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    measured = speed.Measured(options(speed, tmp_path), {"layers": 32}, 4)
    measured.add("FLASH_ATTN", "ttft", {"seconds": 0.5})
    assert not written()
    measured.add("LEXICO-15", "ttft", {"seconds": 0.75})
    assert [(row["metric"], row["ratio"], row["case"]["layers"]) for row in written()] == [("ttft_ratio", 1.5, 32)]
    measured = speed.Measured(options(speed, tmp_path, "--resume"), {"layers": 32}, 4)
    measured.add("FLASH_ATTN", "starved", {"2": {"tokens_per_second": 1.0, "seconds": 1.0}})
    measured.add("LEXICO-15", "starved", {"2": {"tokens_per_second": 3.0, "seconds": 1.0}})
    assert [(row["metric"], row["ratio"], row["case"]["layers"]) for row in written()][1:] == [
        ("output_tokens_per_second", 3.0, 4)
    ]
    longer = {"2": {"tokens_per_second": 3.0, "seconds": 1.0, "answer_tokens": 4096}}
    measured.add("fp8", "starved", longer)  # answers of another length are no peer
    measured.add("LEXICO-7", "starved", longer)
    rows = written()[2:]
    assert [(row["peer"], row["case"]["answer_tokens"]) for row in rows] == [("fp8", 4096)]
    assert "tokens_per_second" not in rows[0]["case"]


def test_every_row_has_its_peer_before_it(speed, tmp_path):
    runs = speed.planned(options(speed, tmp_path))
    assert set(runs) == set(speed.RUNS)
    seen = set()
    for engine, measures in runs:
        for measure in measures:
            assert engine == "FLASH_ATTN" or measure == "steady" or ("FLASH_ATTN", measure) in seen
            seen.add((engine, measure))
    narrowed = options(speed, tmp_path)
    narrowed.measure, narrowed.engines = ["ttft"], ["LEXICO-7", "FLASH_ATTN"]
    assert speed.planned(narrowed) == [("FLASH_ATTN", ("ttft",)), ("LEXICO-7", ("ttft",))]


def test_an_engine_that_hangs_or_dies_costs_only_its_own(speed, tmp_path):
    serves = tmp_path / "serves.py"
    serves.write_text(
        "import subprocess, sys\n"
        "settings = sys.stdin.readline()\n"
        "assert 'dies' not in settings, 'as it was told'\n"
        'print(\'engine=["ttft", {"seconds": 1}, 2.0]\', flush=True)\n'
        "print('engine=[\"decode\", null, 2.0]', flush=True)\n"
        "subprocess.run(['sleep', '600'])\n"
    )
    run = speed.Run("FLASH_ATTN", ("ttft", "decode", "prefill"))
    hangs = speed.EngineProcess(run, {"model": "m"}, options(speed, tmp_path), str(serves))
    assert list(hangs.results(2)) == [("ttft", {"seconds": 1}, 2.0)]
    with pytest.raises(ProcessLookupError):
        os.killpg(hangs._process.pid, 0)
    dies = speed.EngineProcess(run, {"model": "dies"}, options(speed, tmp_path), str(serves))
    assert list(dies.results(60)) == [] and "as it was told" in dies.log.read_text()


def test_only_steps_in_which_all_take_part_count(speed):
    timeline = speed.loads.Timeline(0.0)
    timeline.steps = [(0.1, 1), (0.5, 3)] + [(1.0 + i, 4) for i in range(20)] + [(30.0, 2)]
    assert timeline.intervals(4) == [1.0] * (19 - speed.loads.SETTLE_STEPS)
    assert timeline.seconds == 30.0


def test_positions_fit_a_step(speed):
    for step_tokens in (8192, 512, 128):
        positions = speed.spreads(64, step_tokens)
        assert len(set(positions["aligned"])) == 1
        assert all(0 < sum(new) <= step_tokens and min(new) > 0 for new in positions.values())


def test_pages_without_coding_hold_codes_of_many_atoms(load_benchmark, monkeypatch):
    for operation in ("omp_encode", "omp_encode_layers"):
        monkeypatch.setattr(f"lexico_kernels.ops.{operation}", None)  # put back what importing the module replaces
    uncoded = load_benchmark("bench/uncoded")
    layout = CodeLayout(64, 2, 5, 4, block_tokens=32)
    cache = poisoned_cache(layout, 3, atoms=64, dtype=torch.float16)
    uncoded._omp_encode_layers(LayerStack.of([cache]), None, None)
    for kv in ("key", "value"):
        scales = scale_view(cache.code_pages, layout, kv)
        assert (scales.contiguous().view(torch.bfloat16) == 1).all()
        assert len(entries_at(cache, torch.arange(3 * 32), kv).unique()) > 100
    assert (cache.code_pages[:, layout.page_bytes :] == 0xFF).all()
    before = cache.code_pages.clone()
    uncoded._omp_encode(torch.empty(0), None, cache)
    assert torch.equal(cache.code_pages, before)
