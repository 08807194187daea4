"""Pages and tokens, counted as vLLM's own planning counts them and as they were measured."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from vllm_lexico import cli
from vllm_lexico.check import memory
from vllm_lexico.check.memory import Load
from vllm_lexico.check.model import read_shape
from vllm_lexico.check.states import state_bytes

CACHE_BYTES = 40 << 30


def tokens_by_vllm(specs, load, block_outermost=False):
    """Tokens that fit into CACHE_BYTES, as the line "GPU KV cache size" has them, by vLLM's own planning."""
    from vllm.v1.core import kv_cache_utils as utils

    layout = SimpleNamespace(is_block_outermost=block_outermost)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=load.max_model_len),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        cache_config=SimpleNamespace(mamba_cache_mode="align", get_resolved_kv_cache_layout=lambda: layout),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
        max_in_flight_tokens=load.in_flight_tokens,
    )
    if utils.is_kv_cache_spec_uniform(specs):
        groups = utils._get_kv_cache_groups_uniform_spec(specs)
    elif (groups := utils._get_packed_kv_cache_groups(config, specs)) is None:
        groups = utils._get_kv_cache_groups_uniform_page_size(utils.unify_kv_cache_spec_page_size(specs))
    num_blocks = CACHE_BYTES // utils._get_kv_cache_bytes_per_block(groups, layout)
    planned = SimpleNamespace(num_blocks=num_blocks, kv_cache_groups=groups)
    return utils.get_max_concurrency_for_kv_cache_config(config, planned) * load.max_model_len


def plain_specs(shape, load):
    """Specs as vLLM's attention layers make them with blocks of 16 tokens."""
    from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, FullAttentionSpec, MambaSpec, SlidingWindowSpec

    heads = {"num_kv_heads": shape.heads.on_each(load.gpus), "head_size": shape.heads.size, "dtype": torch.bfloat16}
    token_bytes = 2 * 2 * shape.heads.size * heads["num_kv_heads"]
    block, state = 16, shape.state_bytes(load.gpus)
    if state is not None:
        block *= -(-state // (16 * token_bytes))
    specs = {f"layers.{layer}.attn": FullAttentionSpec(**heads, block_size=block) for layer in shape.coded}
    for one in shape.others:
        for layer in one.layers:
            if one.chunked:
                spec = ChunkedLocalAttentionSpec(**heads, block_size=block, attention_chunk_size=one.window)
            elif one.window:
                spec = SlidingWindowSpec(**heads, block_size=block, sliding_window=one.window)
            elif one.keeps_state:
                spec = MambaSpec(
                    shapes=((state,),),
                    dtypes=(torch.uint8,),
                    block_size=block,
                    page_size_padded=block * token_bytes,
                    mamba_cache_mode="align",
                )
            else:
                continue
            specs[f"layers.{layer}.other"] = spec
    return specs


def coded_specs(shape, sparsity, load):
    """Specs as LEXICO and `other_layers` make them, and whether all pages of a block lie together."""
    from vllm.v1.attention.backend import MultipleOf

    from vllm_lexico.config import LexicoConfig
    from vllm_lexico.serve import other_layers
    from vllm_lexico.serve.setup import LexicoSetup
    from vllm_lexico.serve.tail_pages import tail_spec

    config = LexicoConfig.from_additional_config({"lexico": {"sparsity": sparsity}})
    beside_states = len(shape.coded) if shape.keeps_states else 0
    setup = LexicoSetup(config, None, 0, load.concurrent_batches, beside_states)
    size, heads = shape.heads.size, shape.heads.on_each(load.gpus)
    model = SimpleNamespace(
        get_head_size=lambda: size,
        get_num_kv_heads=lambda parallel: heads,
        dtype=torch.bfloat16,
        max_model_len=load.max_model_len,
        hf_text_config=shape.text,
    )
    engine = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        cache_config=SimpleNamespace(mamba_cache_mode="align"),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=load.chunk_tokens, max_num_scheduled_tokens=None, max_num_seqs=256
        ),
        max_in_flight_tokens=load.in_flight_tokens,
        num_speculative_tokens=0,
    )
    block = 128
    if beside_states:
        block = other_layers.block_beside_states(setup, engine, shape.state_bytes(load.gpus), None)
    elif len(shape.coded) < shape.num_layers:
        block = other_layers.fitting_block(setup, model, None)
    layout = setup.layout(size, heads, block, torch.bfloat16)
    flash = SimpleNamespace(get_supported_kernel_block_sizes=lambda spec: [MultipleOf(16)], get_name=lambda: "FLASH")
    specs = {}
    for name, spec in plain_specs(shape, load).items():
        if beside_states and name.endswith(".other"):
            specs[name] = dataclasses.replace(spec, block_size=block, page_size_padded=None)
        elif name.endswith(".other"):
            specs[name] = other_layers.fitted(spec, flash, layout.page_bytes, name)
        else:
            specs[name] = dataclasses.replace(spec, block_size=block, state_content_bytes=layout.cell_bytes)
            specs[f"{name}.tail"] = tail_spec(setup, layout, torch.bfloat16)
    return specs, bool(beside_states)


LOADS = [
    Load(4096, 2048),
    Load(131072, 8192),
    Load(131072, 1),  # what a decoding request holds
    Load(131072, 2048, gpus=4),
    Load(32768, 512, concurrent_batches=1),
]


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Pages of other layers may be as small there as FlashAttention reads them."""
    pytest.importorskip("vllm")
    from vllm_lexico.serve import other_layers

    monkeypatch.setattr(other_layers, "SMALLEST_PAGE_ON_CPU", other_layers.SMALLEST_PAGE)


@pytest.mark.parametrize(
    "name",
    [
        "Llama-3.1-8B",
        "Gemma-3-27B",
        "gpt-oss-20b",
        "Llama-4-Scout",
        "Falcon-7B",
        "Qwen3-Next-80B",
        "LFM2-1.2B",
        "Nemotron-3-Nano",
        "Falcon-H1-7B",
        "Olmo-3-7B",
        "Gemma-3-12B",
        "Qwen3.5-27B",
        "Granite-4.0-H-Small",
    ],
)
def test_tokens_are_those_of_vllms_planning(name, write_family, on_a_gpu):
    shape = read_shape(name, write_family(name))
    for load in LOADS:
        if shape.heads.number < load.gpus and shape.keeps_states:
            continue
        plain = memory.plain_plan(shape, load).tokens(CACHE_BYTES, load.max_model_len)
        assert abs(plain - tokens_by_vllm(plain_specs(shape, load), load)) < 1, load
        for sparsity in memory.sensible_sparsities(shape.heads.size):
            ours = memory.coded_plan(shape, sparsity, load).tokens(CACHE_BYTES, load.max_model_len)
            specs, block_outermost = coded_specs(shape, sparsity, load)
            assert abs(ours - tokens_by_vllm(specs, load, block_outermost)) < 1, (load, sparsity)


def test_tail_pages_are_those_of_the_tails_spec():
    pytest.importorskip("vllm")
    from lexico_kernels import CodeLayout

    from vllm_lexico.config import LexicoConfig
    from vllm_lexico.serve.setup import LexicoSetup
    from vllm_lexico.serve.tail_pages import tail_spec

    kinds = [{}, {"window": 0, "sinks": 0}, {"window": 1000, "prefix_hits": "window"}]
    for lexico, size, length, chunk, batches in itertools.product(kinds, (64, 256), (100, 9000), (64, 8192), (1, 2)):
        config = LexicoConfig(**lexico)
        layout = CodeLayout(size, 2, 15, 15)
        load = Load(length, chunk, concurrent_batches=batches)
        spec = tail_spec(LexicoSetup(config, None, 0, batches), layout, torch.bfloat16)
        expected = spec.max_admission_blocks_per_request(load.in_flight_tokens, length)
        assert memory.tail_pages(layout, load, config) == expected, (lexico, load)


def test_states_have_the_bytes_that_vllm_gives_them(write_family):
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.mamba.mamba_utils import MambaStateShapeCalculator as Shapes

    def size(shapes, *elements):
        return sum(torch.Size(shape).numel() * one for shape, one in zip(shapes, elements, strict=True))

    qwen, lfm, nemotron = (
        read_shape(name, write_family(name)).text for name in ("Qwen3-Next-80B", "LFM2-1.2B", "Nemotron-3-Nano")
    )
    for gpus in (1, 2, 8):
        expected = size(Shapes.gated_delta_net_state_shape(gpus, 16, 32, 128, 128, 4), 2, 2)
        assert state_bytes(qwen, gpus) == expected
        assert state_bytes(lfm, gpus) == size(Shapes.short_conv_state_shape(gpus, 2048, 3), 2)
        mamba = Shapes.mamba2_state_shape(gpus, 4096, 8, 64, 64, 128, 4)
        assert state_bytes(nemotron, gpus) == size(mamba, 2, 4)
    jamba = SimpleNamespace(mamba_dt_rank=256, mamba_expand=2, hidden_size=4096, mamba_d_conv=4, mamba_d_state=16)
    assert state_bytes(jamba, 2) == size(Shapes.mamba1_state_shape(2, 8192, 16, 4), 2, 2)
    bamba = SimpleNamespace(
        mamba_n_heads=128, mamba_d_head=64, mamba_d_state=256, mamba_n_groups=1, mamba_d_conv=4, mamba_expand=2
    )
    bamba.hidden_size = 4096
    for gpus in (1, 2):
        assert state_bytes(bamba, gpus) == size(Shapes.mamba2_state_shape(gpus, 8192, 1, 128, 64, 256, 4), 2, 2)
    assert state_bytes(SimpleNamespace()) is None


def rows_of(root, results, metric):
    lines = (root / "benchmarks" / "results" / f"{results}.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["metric"] == metric]


def test_tokens_are_those_that_were_measured(root, write_family, capsys):
    """The whole of it, weights and working memory too, is within 2 % of what vLLM said on an H200."""
    folder = write_family("Llama-3.1-8B")
    flags = ["--gpu-memory", "139.8GiB", "--gpu-memory-utilization", "0.9", "--max-model-len", "32768"]
    assert cli.main(["check", folder, *flags, "--max-num-batched-tokens", "16384", "--json"]) == 0
    rows = {row["sparsity"]: row["tokens"] for row in json.loads(capsys.readouterr().out)["caches"]}
    measured = rows_of(root, "engine", "kv_cache_tokens")
    assert {row["case"]["bytes_percent"] for row in measured} >= {12.5, 6.25}
    for row in measured:
        sparsity = {12.5: 15, 6.25: 7}[row["case"]["bytes_percent"]]
        assert rows[sparsity] == pytest.approx(row["value"], rel=0.02)
        assert rows[None] == pytest.approx(row["peer_value"], rel=0.02)


def test_the_time_of_training_is_that_of_a_row(root, write_family):
    from vllm_lexico.check.dictionary import MEASURED
    from vllm_lexico.check.model import weights_per_token

    (row,) = [row for row in rows_of(root, "dictionary", "train_seconds") if row["date"].startswith(MEASURED.date)]
    assert (row["gpu"], row["case"]["model"], row["case"]["layers"]) == (MEASURED.gpu, MEASURED.model, MEASURED.layers)
    assert MEASURED.seconds == pytest.approx(row["value"], abs=0.1)
    assert (MEASURED.reading, MEASURED.learning) == (row["case"]["reading_seconds"], row["case"]["learning_seconds"])
    assert MEASURED.seconds_for(28, 2, MEASURED.weights_per_token) == pytest.approx(MEASURED.seconds)
    text = read_shape("Qwen2.5-7B", write_family("Qwen2.5-7B")).text
    for name, value in {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12}.items():
        setattr(text, name, value)
    text.num_key_value_heads = 2
    assert weights_per_token(text) == pytest.approx(MEASURED.weights_per_token, rel=0.01)
