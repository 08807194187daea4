"""What `decode.py` makes of layers in turn and of ways for kernels to follow one another; without a GPU."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lexico_kernels.device import launch


@pytest.fixture
def decode(import_benchmark, monkeypatch):
    pytest.importorskip("triton")
    module = import_benchmark("decode")

    def captured(call):
        given = call()
        return SimpleNamespace(replay=lambda: [old.copy_(new) for old, new in zip(given, call(), strict=True)]), given

    monkeypatch.setattr(module, "captured", captured)
    monkeypatch.setattr(module, "graph_ms", lambda call: (call(), 6.0)[1])
    monkeypatch.setattr(module.overlap, "supports", lambda _: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return module


def test_a_layers_time_in_each_way_and_other_bits_are_seen(decode):
    used, served = [], launch.OVERLAP

    def attend():
        used.append(launch.OVERLAP)
        return torch.full((2,), 1.0 + (launch.OVERLAP and len(used) % 5 == 0))

    took = decode.measure([SimpleNamespace(attend=attend)] * 3, ["off", "on"])
    assert took == {"off": 2.0, "on": float("inf")}
    assert (launch.OVERLAP, used[:3], set(used)) == (served, [False] * 3, {False, True})


def test_rows_say_how_kernels_were_launched(decode, monkeypatch, tmp_path):
    monkeypatch.setattr(decode, "record", partial(decode.record, folder=tmp_path))
    decode.keep_rows({"layers": 8}, {"off": 2.0, "on": 1.0}, {"FLASH_ATTN": (3.0, 0.1)})
    decode.keep_rows({"layers": 8}, {"off": 2.0}, {"FLASH_ATTN": (3.0, 0.1)})
    rows = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert [(row["metric"], row["case"]["launches"], row["value"]) for row in rows] == [
        ("decode_ms", "off", 2.0), ("decode_ms", "on", 1.0), ("speedup", "on", 3.0), ("decode_ms", "off", 2.0)
    ]  # fmt: skip
    assert all(row["case"]["layers"] == 8 for row in rows)


def test_what_serves_is_what_the_gpu_can(decode, monkeypatch):
    assert decode.served() == "on"
    with decode.launched("off"):
        assert decode.served() == "off"
    monkeypatch.setattr(decode.overlap, "supports", lambda _: False)
    assert decode.served() == "off"


def test_layers_have_pages_and_dictionaries_of_their_own(decode):
    steps = [decode.Step.random(decode.Case(1, 300, 5, 1, 2, 64), device="cpu", seed=seed) for seed in range(2)]
    one, other = (step.cache for step in steps)
    for at in ("code_pages", "tail_pages"):
        assert not torch.equal(getattr(one, at), getattr(other, at))
    assert not torch.equal(one.value.atoms, other.value.atoms)
