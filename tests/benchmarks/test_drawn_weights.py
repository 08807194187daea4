"""What is drawn in the place of dummy weights, in modules named as vLLM's are."""

import pytest
import torch


@pytest.fixture
def model(import_benchmark):
    import_benchmark("families")
    kinds = {name: type(name, (torch.nn.Module,), {}) for name in ("VocabParallelEmbedding", "GemmaRMSNorm", "RMSNorm")}
    model = torch.nn.Module()
    for name, kind in kinds.items():
        model.add_module(name, kind())
        size = (500, 64) if name == "VocabParallelEmbedding" else (64,)
        model.get_submodule(name).weight = torch.nn.Parameter(torch.full(size, 0.3))
    for name in ("first", "second"):
        layer = torch.nn.Linear(256, 64).bfloat16()
        torch.nn.init.constant_(layer.bias, 7)
        model.add_module(name, layer)
    model.first.A_log = torch.nn.Parameter(torch.full((4,), 0.5))
    model.first.packed = torch.nn.Parameter(torch.full((4, 4), 3, dtype=torch.uint8), requires_grad=False)
    return model


def test_weights_are_drawn_by_their_kind(model):
    from bench.drawn_weights import draw_weights

    addresses = [weight.data_ptr() for weight in model.parameters()]
    draw_weights(model)
    assert addresses == [weight.data_ptr() for weight in model.parameters()], "CUDA graphs would read the old ones"
    assert model.VocabParallelEmbedding.weight.std().item() == pytest.approx(1, rel=0.05)
    assert model.first.weight.float().std().item() == pytest.approx(1 / 16, rel=0.05)
    assert not torch.equal(model.first.weight, model.second.weight), "layers would be alike"
    assert model.first.bias.abs().sum() == 0
    assert model.GemmaRMSNorm.weight.unique().tolist() == [0] and model.RMSNorm.weight.unique().tolist() == [1]
    assert model.first.A_log.unique().tolist() == [0.5] and model.first.packed.unique().tolist() == [3]


def test_weights_are_the_same_in_every_engine(model):
    from bench.drawn_weights import draw_weights

    draw_weights(model)
    before = model.second.weight.clone()
    draw_weights(model)
    assert torch.equal(before, model.second.weight)
