"""What vLLM's warm-up compiles is all that steps launch."""

import random
import types

import pytest
import torch

pytest.importorskip("vllm")
pytest.importorskip("triton")
from step_runner import Runner, Shape, recorded

from vllm_lexico.serve import warm_up

SHAPES = {
    "llama": Shape(32, 8, 128, atoms=4096, fp8=True),
    "many_splits": Shape(32, 8, 128, 7, atoms=512, max_model_len=1 << 18, max_requests=64),
    "small_heads": Shape(6, 2, 64, drafts=3),
    "odd_heads": Shape(5, 1, 96, 11, max_model_len=2048),
    "gemma": Shape(8, 2, 256, 31, soft_cap=50.0),
    "sinks": Shape(8, 2, 64, sinks=True, dtype=torch.float16),
    "same": Shape(8, 2, 64, prefix_hits="same"),
    "later": Shape(8, 2, 64, coded_later=512),
    "hybrid": Shape(8, 2, 64, block_tokens=512, beside_states=2),
    "no_clusters": Shape(8, 2, 128, atoms=512, fp8=True, clusters=False),
    "no_clusters_and_a_crowd": Shape(8, 2, 128, atoms=512, fp8=True, clusters=False, max_requests=80),
    "triton_alone": Shape(8, 2, 64, cuda_cpp=False),
    "exact": Shape(8, 2, 64, codec="exact"),
    "uneven": Shape(8, 4, 64, 7, atoms_by_head=((3, 11, 3, 11), (7, 3, 7, 7))),
    "uneven_fp8": Shape(16, 4, 128, 7, fp8=True, atoms_by_head=((3, 15, 3, 3), (15, 3, 3, 3))),
}


def mixed_load(shape, seed=0):
    """Steps of all kinds: cold prompts short and long, later chunks, hits, decode with and without drafts, crowds."""
    rng, most, decoded = random.Random(seed), shape.max_model_len, 1 + shape.drafts
    fewest = 1 if shape.atoms_by_head else shape.kv_heads  # heads that a launch codes
    limit = min(most, 4096 // (2 * fewest) + 40)  # tokens of a step, from few vectors to many

    def prompt(new):
        return new, rng.choice([0, 0, shape.block_tokens, rng.randrange(most - new)])

    yield from ([(count, 0)] for count in (decoded + 1, 31, 32, 33, limit))
    yield from ([(count, most - count - 1)] for count in (decoded + 1, 100, limit - 1))
    for size in (1, 2, 7, 8, 16, 17, shape.max_requests):
        yield [(decoded, rng.randrange(most - decoded)) for _ in range(size)]
    for _ in range(12):
        decodes = [(decoded, rng.randrange(most - decoded)) for _ in range(rng.randrange(shape.max_requests - 3))]
        prompts = [prompt(rng.randrange(decoded + 1, limit // 4)) for _ in range(rng.randrange(1, 4))]
        yield decodes + prompts


@pytest.fixture
def launches(base_config):
    """What the warm-up of a shape launches, by the names of its functions, and what steps launch."""

    def both(shape):
        runner = Runner(base_config, shape)
        warm = {}
        for launch in warm_up.LAUNCHES:
            with recorded(shape) as warm[launch.__name__]:
                for name in runner.names:
                    layer = runner.layers[name]
                    launch(layer.impl._to_warm_up(layer)())
        with recorded(shape) as launched:
            for requests in mixed_load(shape):
                runner.step(requests)
        return warm, launched

    return both


@pytest.mark.parametrize("name", SHAPES)
def test_steps_launch_what_was_warmed_up_and_nothing_else(name, launches):
    by_function, launched = launches(SHAPES[name])
    warm = set().union(*by_function.values())
    assert not launched - warm, sorted(launched - warm)
    assert not warm - launched, f"compiled for nothing: {sorted(warm - launched)}"


def test_parts_share_the_kernels_that_read_no_records(launches):
    """However many heads they have, and of whichever sparsity: an engine with unlike heads starts hardly later."""
    alike = Shape(32, 8, 128, 15)
    unlike = alike._replace(atoms_by_head=((31,) + (11,) * 7, (31,) * 2 + (11,) * 6))
    found = []
    for shape in (alike, unlike):
        by_function, _ = launches(shape)
        kernels = by_function["write"] | by_function["decode"]
        assert len([name for name, _ in kernels if name == "attend_codes"]) == (2 if shape is unlike else 1)
        found.append({(name, key) for name, key in kernels if name != "attend_codes"})
    assert found[0] == found[1]
    assert {name for name, _ in found[0]} == {"prepare", "merge", "multiply_bins", "_write_tail"}


def test_each_function_of_the_warm_up_is_needed(launches):
    by_function, launched = launches(SHAPES["small_heads"])
    for name in by_function:
        others = set().union(*(found for other, found in by_function.items() if other != name))
        assert launched - others, name


def test_a_count_that_is_compiled_apart_is_seen(launches, monkeypatch):
    """With one token alone, launches for the query heads of many are never met."""
    monkeypatch.setattr(warm_up, "DECODED_TOKENS", (1,))
    by_function, launched = launches(SHAPES["odd_heads"])
    missing = launched - set().union(*by_function.values())
    assert {name for name, _ in missing} == {"multiply_bins"}


def test_vllms_registry_launches_layers_that_are_alike_once(base_config, monkeypatch):
    """It is active while weights are loaded; pages come later, and layers without any are left out."""
    from vllm.model_executor.warmup.jit_warmup import JitWarmupRegistry

    runner, seen = Runner(base_config, SHAPES["small_heads"]), []
    monkeypatch.setattr(warm_up, "LAUNCHES", (lambda layer: seen.append(layer.impl),))
    registry = JitWarmupRegistry(runner.config)
    layers = [runner.layers[name] for name in runner.names]
    bare = types.SimpleNamespace(kv_cache=torch.tensor([]))
    with registry.activate():
        for layer in layers:
            warm_up.register(layer.impl._to_warm_up(layer))
        warm_up.register(layers[0].impl._to_warm_up(bare))
    monkeypatch.setattr("vllm.distributed.is_global_first_rank", lambda: False)
    registry.warmup()
    assert seen == [layers[0].impl]
    layers[1].impl.soft_cap = 30.0  # another kernel
    registry.warmup()
    assert seen == [layers[0].impl] * 2 + [layers[1].impl]
