"""Quantized checkpoints are read as what their numbers stand for, packed as vLLM, transformers and others pack them."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_lexico.train.capture import load_model
from vllm_lexico.train.quantized import mxfp4, spread

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import HEADS, write_family

GROUP = 32
E4M3 = torch.float8_e4m3fn


def fp8(weight, scale):
    """Numbers of FP8 that times `scale`, spread to the weight's shape, are about the weight; and what they are then."""
    numbers = (weight / scale).to(E4M3)
    return numbers, numbers.float() * scale


def of_tensor(weight):
    scale = weight.abs().max() / 448
    numbers, expected = fp8(weight, scale)
    return {"weight": numbers, "weight_scale": scale.reshape(1), "input_scale": torch.ones(1)}, expected


def of_rows(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    numbers, expected = fp8(weight, scale)
    return {"weight": numbers, "weight_scale": scale}, expected


def of_blocks(weight):
    """Blocks of 48 by 48, the last ones cut, each with a scale of its own."""
    scale = torch.rand(-(-weight.shape[0] // 48), -(-weight.shape[1] // 48)) / 100 + 0.001
    rows, columns = torch.arange(weight.shape[0]) // 48, torch.arange(weight.shape[1]) // 48
    numbers, expected = fp8(weight, scale[rows][:, columns])
    return {"weight": numbers, "weight_scale_inv": scale}, expected


def integers(weight, bits, centre=None):
    """[out, groups, GROUP] -> unsigned integers [out, in], zero points and scales [out, groups], and what they are."""
    grouped = weight.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(2), grouped.amax(2)
    if centre is not None:
        high = torch.maximum(high, -low)
        low = -high
    scale = ((high - low) / (2**bits - 1)).half().float()
    zero = (-low / scale).round().clamp(1, 2**bits - 1) if centre is None else torch.full_like(scale, centre)
    numbers = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, 2**bits - 1)
    expected = (numbers - zero[..., None]) * scale[..., None]
    return numbers.flatten(1).int(), zero.int(), scale, expected.flatten(1)


def by_awq(weight):
    from vllm.model_executor.layers.quantization.utils.quant_utils import awq_pack

    numbers, zero, scale, expected = integers(weight, 4)
    out, inner = weight.shape
    made = {
        "qweight": awq_pack(numbers.T.contiguous(), 4, inner, out),
        "qzeros": awq_pack(zero.T.contiguous(), 4, inner // GROUP, out),
        "scales": scale.T.half().contiguous(),
    }
    return made, expected


def by_gptq(weight, bits=4, offset=1, shuffled=False):
    from vllm.model_executor.layers.quantization.utils.quant_utils import gptq_pack, pack_cols

    out, inner = weight.shape
    order = torch.randperm(inner) if shuffled else torch.arange(inner)
    numbers, zero, scale, expected = integers(weight[:, order], bits)
    back = order.argsort()
    made = {
        "qweight": gptq_pack(numbers[:, back].T.contiguous(), bits, inner, out),
        "qzeros": pack_cols(zero.T.contiguous() - offset, bits, inner // GROUP, out),
        "scales": scale.T.half().contiguous(),
        "g_idx": (back // GROUP).int(),
    }
    return made, expected[:, back]


def by_compressed_tensors(weight, bits=4, symmetric=True):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 2 ** (bits - 1)
    numbers, zero, scale, expected = integers(weight, bits, half if symmetric else None)
    made = {
        "weight_packed": pack_to_int32((numbers - half).to(torch.int8), bits),
        "weight_scale": scale.half(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        made["weight_zero_point"] = pack_to_int32((zero - half).to(torch.int8), bits, packed_dim=0).contiguous()
    return made, expected


def by_int8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    numbers = (weight / scale).round().to(torch.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers.float() * scale


def packed(bits, **weights):
    group = {"weights": {"num_bits": bits, "group_size": GROUP, **weights}, "targets": ["Linear"]}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}


CASES = {
    "fp8-blocks": (of_blocks, {"quant_method": "fp8", "weight_block_size": [48, 48]}),
    "fp8-tensor": (of_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
    "fp8-rows": (of_rows, {"quant_method": "fbgemm_fp8"}),
    "compressed-fp8-rows": (of_rows, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "compressed-int8": (by_int8, {"quant_method": "compressed-tensors", "format": "int-quantized"}),
    "compressed-int4": (by_compressed_tensors, packed(4)),
    "compressed-int4-zero": (lambda weight: by_compressed_tensors(weight, symmetric=False), packed(4)),
    "compressed-int8-packed": (lambda weight: by_compressed_tensors(weight, 8), packed(8)),
    "awq": (by_awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}),
    "gptq": (by_gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP}),
    "gptq-8-shuffled": (lambda weight: by_gptq(weight, 8, shuffled=True), {"quant_method": "gptq", "bits": 8}),
    "gptq-v2": (
        lambda weight: by_gptq(weight, offset=0),
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
    ),
}


def quantize(model, folder, make, scheme):
    """Write a checkpoint whose layers' matrices are quantized; returns what they then are, by name."""
    torch.manual_seed(1)
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    weights, expected = load_file(folder / "model.safetensors"), {}
    for name in [name for name in weights if name.endswith("proj.weight")]:
        parts, expected[name] = make(weights.pop(name).float())
        weights |= {f"{name.removesuffix('weight')}{part}": tensor.clone() for part, tensor in parts.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return expected


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_checkpoint_is_read_as_what_it_stands_for(name, tiny_model, tmp_path):
    expected = quantize(tiny_model, tmp_path / name, *CASES[name])
    original = load_file(tiny_model / "model.safetensors")
    model = load_model(str(tmp_path / name), "cpu", "float32")
    got = dict(model.named_parameters())
    assert len(expected) == 14
    for weight, tensor in expected.items():
        torch.testing.assert_close(got[weight], tensor, atol=1e-6, rtol=1e-5)
        assert 0 < (tensor - original[weight]).abs().max() < 0.3 * original[weight].abs().max()
    ids = torch.randint(64, (1, 20))
    assert model(ids).logits.isfinite().all()
    torch.testing.assert_close(got["model.norm.weight"], original["model.norm.weight"].float())


def test_its_own_dtype_is_the_configurations(tiny_model, tmp_path):
    quantize(tiny_model, tmp_path / "model", *CASES["awq"])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    loaded = load_model(str(tmp_path / "model"), "cpu", "auto")
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float16}


def test_the_shards_of_a_checkpoint_are_read_together(tiny_model, tmp_path):
    """A scale may be in another file than its weight."""
    expected = quantize(tiny_model, tmp_path / "model", *CASES["fp8-blocks"])
    weights = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    files = {name: f"model-{at % 2}.safetensors" for at, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        save_file({name: weights[name] for name in files if files[name] == file}, tmp_path / "model" / file)
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    save_file({"old.weight": torch.ones(1)}, tmp_path / "model" / "consolidated.safetensors")
    got = dict(load_model(str(tmp_path / "model"), "cpu", "float32").named_parameters())
    for weight, tensor in expected.items():
        torch.testing.assert_close(got[weight], tensor)


@pytest.mark.parametrize(
    ("scheme", "parts", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, None, "bitsandbytes"),
        ({"quant_method": "fp8"}, {"weight": E4M3}, r"_proj.weight is float8_e4m3fn without a scale"),
        ({"quant_method": "compressed-tensors"}, {"weight_packed": torch.uint8}, r"weight_packed is uint8 without"),
        ({"quant_method": "gptq", "bits": 3}, {"qweight": torch.int32}, "GPTQ of 3 bits"),
        ({"quant_method": "awq", "bits": 8}, {"qweight": torch.int32, "qzeros": torch.int32}, "AWQ of 8 bits"),
        (
            {"quant_method": "gptq", "bits": 4},
            dict.fromkeys(("qweight", "qzeros", "g_idx"), torch.int32) | {"scales": torch.float16},
            "GPTQ of other bits than the 4",
        ),
        (
            {"quant_method": "compressed-tensors"},
            {"weight": torch.int8, "weight_scale": torch.float16, "weight_g_idx": torch.int32},
            "columns are reordered",
        ),
    ],
)
def test_weights_that_nothing_here_reads_are_refused_in_one_sentence(tiny_model, tmp_path, scheme, parts, words):
    made = {part: torch.zeros(64, 8, dtype=torch.float32).to(dtype) for part, dtype in (parts or {}).items()}
    quantize(tiny_model, tmp_path / "model", (lambda weight: (made, weight)) if made else of_tensor, scheme)
    with pytest.raises(ValueError, match=rf"cannot be read \(.*{words}.*dictionary serves its quantized twins too"):
        load_model(str(tmp_path / "model"), "cpu", "auto")


def test_scales_that_the_configuration_does_not_explain_are_refused(tiny_model, tmp_path):
    """As older ModelOpt's, which keeps its scheme in another file: transformers would read numbers without scales."""
    quantize(tiny_model, tmp_path / "model", *CASES["fp8-blocks"])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"_proj.weight_scale_inv, and its config.json does not .*hf_quant_config.json"
    ):
        load_model(str(tmp_path / "model"), "cpu", "float32")


def test_scales_of_more_dimensions_are_refused(tiny_model, tmp_path):
    made = {"weight": torch.zeros(64, 8).to(E4M3), "weight_scale": torch.ones(2, 1, 2, 1)}
    quantize(tiny_model, tmp_path / "model", lambda weight: (made, weight), {"quant_method": "modelopt"})
    with pytest.raises(ValueError, match=r"scales of shape \(2, 1, 2, 1\), which is not read here"):
        load_model(str(tmp_path / "model"), "cpu", "float32")


def test_a_shard_that_is_not_there_is_named(tiny_model, tmp_path):
    quantize(tiny_model, tmp_path / "model", *CASES["fp8-blocks"])
    index = {"weight_map": {"some.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(OSError, match="model-00001-of-00002"):
        load_model(str(tmp_path / "model"), "cpu", "float32")


def test_mxfp4_is_what_transformers_reads():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (2, 6, 3, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(110, 130, (2, 6, 3), generator=generator).to(torch.uint8)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert expected.shape == (2, 96, 6) and torch.equal(mxfp4(blocks, scales), expected)


def test_scales_of_blocks_are_spread_over_what_they_belong_to():
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    cut = spread(scale, torch.Size((3, 5)), (2, 3))
    assert cut.tolist() == [[1, 1, 1, 2, 2], [1, 1, 1, 2, 2], [3, 3, 3, 4, 4]]
    assert spread(scale, torch.Size((4, 4)), None).tolist()[1] == [1, 1, 2, 2]
    assert spread(torch.tensor(5.0), torch.Size((4, 4)), (2, 2)).tolist() == [[5]]
    assert spread(torch.tensor([1.0, 2.0]), torch.Size((2, 4)), None).tolist() == [[1], [2]]


def test_the_experts_of_a_quantized_checkpoint_are_read(tmp_path):
    """Kept one by one, as Qwen3's in FP8 are; transformers has them in one tensor."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    few = {"moe_intermediate_size": 16, "num_experts": 3, "num_experts_per_tok": 2}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**HEADS | few)).save_pretrained(tmp_path / "plain")
    expected = quantize(tmp_path / "plain", tmp_path / "fp8", *CASES["fp8-blocks"])
    assert sum(".experts.2." in name for name in expected) == 3 * HEADS["num_hidden_layers"]
    weights = load_file(tmp_path / "plain" / "model.safetensors") | expected
    save_file(weights, tmp_path / "plain" / "model.safetensors", metadata={"format": "pt"})
    ids = torch.randint(60, (1, 20), generator=torch.Generator().manual_seed(2))
    plain, read = (load_model(str(tmp_path / name), "cpu", "float32") for name in ("plain", "fp8"))
    torch.testing.assert_close(read(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


def test_experts_in_mxfp4_are_read(tmp_path):
    """As gpt-oss has them; what else it has is in its own dtype."""
    folder = write_family("gpt-oss", tmp_path)
    generator, expected = torch.Generator().manual_seed(0), {}
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, out = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(256, (experts, out, inner // 32, 16), generator=generator).byte()
        weights[f"{name}_scales"] = torch.randint(118, 124, (experts, out, inner // 32), generator=generator).byte()
        expected[name] = mxfp4(weights[f"{name}_blocks"], weights[f"{name}_scales"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    scheme = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (folder / "config.json").write_text(json.dumps(config | scheme))
    got = dict(load_model(str(folder), "cpu", "float32").named_parameters())
    assert len(expected) == 2 * HEADS["num_hidden_layers"]
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor)
