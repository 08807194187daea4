"""A model whose layers come onto the device one after the other: what is captured is the same, and how they come."""

import json
import sys
import threading
from pathlib import Path

import pytest
import torch

from vllm_lexico.train import capture as capturing
from vllm_lexico.train import in_turn as turns_module
from vllm_lexico.train import rounds, run
from vllm_lexico.train.asked import Asking, measure_shares
from vllm_lexico.train.capture import capture, load_model, text_model
from vllm_lexico.train.in_turn import Turns, WaitingLayer, hold_in_turn, is_too_large, read_all, turns_of
from vllm_lexico.train.model import read_facts
from vllm_lexico.train.progress import Progress
from vllm_lexico.train.vllm_writer import engine_arguments

sys.path.insert(0, str(Path(__file__).parent))
from small_runs import same, settings_for, train
from tiny_models import FAMILIES, write_family

GIB = 1 << 30


@pytest.mark.parametrize("name", ["gemma3", "gpt-oss", "qwen3-next", "nemotron-h", "granite4", "qwen2.5-vl", "llama4"])
def test_what_is_captured_is_what_the_whole_model_has(name, tmp_path):
    """Of families with windows, sinks, states, experts and images."""
    folder = write_family(name, tmp_path)
    shape = read_facts(str(folder)).fingerprint
    texts = torch.randint(60, (7, 40), generator=torch.Generator().manual_seed(3))
    got = []
    for in_turn in (False, True):
        model = load_model(str(folder), "cpu", "float32", in_turn=in_turn)
        queries = torch.zeros(len(shape.layers), shape.num_kv_heads, shape.head_dim)
        told: list[int] = []
        heads = shape.num_kv_heads, shape.head_dim
        more = {"furthest": 90, "queries": queries, "advance": told.append}
        got.append((capture(model, texts, 20, shape.layers, heads, 1, 2, **more), queries))
        assert told == [80, 80, 80, 40] and bool(queries.any())
    for whole, turned in zip(*got, strict=True):
        assert torch.equal(whole, turned)
    turns = turns_of(text_model(model))
    assert turns is not None and turns.brought == FAMILIES[name][1].get("num_hidden_layers", len(turns_layers(model)))


def turns_layers(model):
    return [part for part in model.modules() if isinstance(part, WaitingLayer)]


def test_a_layer_comes_once_for_as_many_texts_as_are_under_way(tiny_model, monkeypatch):
    model = load_model(str(tiny_model), "cpu", "float32", in_turn=True)
    layers, seen = [waiting.layer for waiting in turns_layers(model)], []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: seen.append(number))
    texts = torch.randint(60, (5, 32), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(capturing, "TOGETHER_TOKENS", 3 * 32)
    whole = capture(load_model(str(tiny_model), "cpu", "float32"), texts, 16, [0, 1], (2, 64), 1, 1)
    assert torch.equal(capture(model, texts, 16, [0, 1], (2, 64), 1, 1), whole)
    assert seen == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1] and turns_of(text_model(model)).brought == 4


def test_how_often_heads_are_asked_is_the_same(tiny_model):
    texts = torch.randint(60, (3, 64), generator=torch.Generator().manual_seed(4))
    asking = Asking(3, 64, (0,), (5, 6))
    models = [load_model(str(tiny_model), "cpu", "float32", in_turn=in_turn) for in_turn in (False, True)]
    whole, turned = (measure_shares(model, texts, [0, 1], 2, asking) for model in models)
    assert torch.equal(whole, turned) and turns_of(text_model(models[1])).brought == 2


def test_the_first_error_is_told_and_all_end(tiny_model):
    model = load_model(str(tiny_model), "cpu", "float32", in_turn=True)
    before, after = threading.active_count(), []

    def read(number):
        model(torch.ones(1, 4, dtype=torch.int64))
        if number == 1:
            raise ValueError("the second text")
        after.append(number)

    with pytest.raises(ValueError, match="the second text"):
        read_all(text_model(model), [lambda number=number: read(number) for number in range(4)], 4)
    assert after == [0] and threading.active_count() <= before
    read_all(text_model(model), [lambda: read(5), lambda: read(6)], 4)  # and it can be read with again
    assert after == [0, 5, 6]


def test_only_the_layer_whose_turn_it_is_is_on_the_device():
    """On a "device" that a CPU has: tensors there are copies, and what was there goes."""
    layers = [torch.nn.Linear(2, 2) for _ in range(3)]
    homes = [layer.weight.data_ptr() for layer in layers]

    class Elsewhere(torch.nn.Module):
        pass

    model = Elsewhere()
    model.layers = torch.nn.ModuleList(layers)
    hold_in_turn(model, model, 3, "cpu")
    turns = turns_of(model)
    turns.device = torch.float64  # Tensor.to takes it as it takes a device, and copies
    for at, layer in enumerate(layers):
        turns.arrive(layer)
        assert [other.weight.dtype == torch.float64 for other in layers] == [number == at for number in range(3)]
    turns.bring(None)
    assert [layer.weight.data_ptr() for layer in layers] == homes
    assert model.layers[0].in_features == 2 and not hasattr(model.layers[0], "nothing")


def test_a_model_without_one_list_of_its_layers_is_refused():
    model = torch.nn.Sequential(torch.nn.ModuleList([torch.nn.Linear(2, 2)]))
    with pytest.raises(ValueError, match=r"not in one list.* allowed are models that have all 3 in one; take a GPU"):
        hold_in_turn(model, model, 3, "cpu")
    assert turns_of(model) is None and isinstance(Turns("cpu"), Turns)


def test_when_a_model_is_too_large():
    assert not is_too_large(65 * GIB, 12 * GIB, 140 * GIB) and is_too_large(141 * GIB, 12 * GIB, 140 * GIB)
    assert is_too_large(16 * GIB, 12 * GIB, 24 * GIB)
    assert not is_too_large(16 * GIB, 12 * GIB, 8 * GIB)  # no room for the vectors either


def test_weights_are_counted_in_the_checkpoints_own_dtype(tiny_model, monkeypatch):
    """Its float32, which "auto" means: three bytes for each number are room for half as much, and not for that."""
    config = json.loads((tiny_model / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float32"
    numbers = turns_module.count_parameters(turns_module.read_config(str(tiny_model), ""))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * numbers, 4 * numbers))
    for dtype, too_large in (("auto", True), ("float32", True), ("bfloat16", False)):
        assert turns_module.comes_in_turn(str(tiny_model), dtype, "", 0, "cuda:0") == too_large


@pytest.mark.gpu
def test_on_a_gpu_layers_come_from_host_memory(tiny_model):
    texts = torch.randint(60, (5, 32), generator=torch.Generator().manual_seed(3))
    whole, turned = (load_model(str(tiny_model), "cuda", "float32", in_turn=in_turn) for in_turn in (False, True))
    kept = [capture(model, texts, 16, [0, 1], (2, 64), 1, 2) for model in (whole, turned)]
    assert kept[1].is_cuda
    torch.testing.assert_close(*kept, atol=1e-5, rtol=1e-5)  # threads have cuBLAS handles of their own
    assert {weight.device.type for part in turns_layers(turned) for weight in part.parameters()} == {"cpu"}
    assert turned.device.type == "cuda" and turned.dtype == torch.float32


def test_a_dictionary_of_a_model_that_comes_in_turn_is_the_same(tiny_model, texts, tmp_path, monkeypatch, capsys):
    whole = train(tiny_model, settings_for(texts, rounds=2), tmp_path / "whole.safetensors")
    monkeypatch.setattr(run, "comes_in_turn", lambda *_: True)
    turned = train(tiny_model, settings_for(texts, rounds=2), tmp_path / "turned.safetensors")
    assert same(whole, turned)
    assert "cpu does not hold the model: its layers wait in host memory" in capsys.readouterr().out


def test_it_is_not_written_with_one_layer_at_a_time(tiny_model, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "comes_in_turn", lambda *given: asked.append(given) or True)
    monkeypatch.setattr(run, "cpu_dtype", lambda _: "float32")  # whatever this machine's CPU has arithmetic in
    with pytest.raises(ValueError, match=r"larger than the GPU.*give --data, or the name of a quantized twin"):
        train(tiny_model, settings_for(), tmp_path / "d.safetensors")
    (model, dtype, overrides, beside, device), tokens = asked[0], 3 * 48  # 768 vectors of 2 heads in 3 rounds
    assert (model, dtype, overrides, device) == (str(tiny_model), "float32", "", "cpu")
    assert beside == tokens * 2 * 2 * 2 * 64 * 4  # layers, K and V, heads, numbers, bytes


def test_vllm_writes_with_all_gpus_where_one_does_not_hold_the_model(tiny_model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(run, "own_text", lambda writer, job, *_: seen.append(job) or {"writer": "vLLM"})
    shape = read_facts(str(tiny_model)).fingerprint
    job = rounds.Job(str(tiny_model), settings_for(), shape, run.Plan(1, 4, 1, 64), None, 0.0, in_turn=True)
    for gpus, taken in ((1, 1), (2, 2), (3, 2), (8, 8)):
        run._write(job, [("cpu", [0, 1])], Progress(), gpus)
        assert seen[-1].gpus == taken
    assert engine_arguments(seen[-1], False)["tensor_parallel_size"] == 8
    assert "tensor_parallel_size" not in engine_arguments(seen[0], False)
