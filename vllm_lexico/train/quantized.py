"""Quantized checkpoints as ordinary weights: for training, which needs what a model computes and none of its speed.

Read are FP8 with one scale per tensor, row or block (`fp8`, `fbgemm_fp8`, `modelopt`, `compressed-tensors`), integers
of compressed-tensors, packed or not, AWQ, GPTQ and MXFP4. No other package is needed than safetensors.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

METHODS = ("awq", "compressed-tensors", "fbgemm_fp8", "fp8", "gptq", "modelopt", "mxfp4")
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in its 32 bits AWQ keeps each of eight neighbouring columns
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # numbers of the format e2m1 without their sign
MXFP4_BIAS = 127  # of the exponents that MXFP4 has as scales
# What else belongs to a weight, or to activations and caches, and is no weight itself.
BESIDE = (
    ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_zero_point", ".weight_shape",
    ".weight_g_idx", ".input_scale", ".activation_scale", ".output_scale", ".q_scale", ".k_scale", ".v_scale",
)  # fmt: skip
# Ends of names that only quantized weights have beside them.
OF_QUANTIZED = (".weight_scale", ".weight_scale_inv", ".scales", "_blocks")


class UnreadWeightsError(ValueError):
    """Weights are kept in a way that is not read here; names the first."""


Weights = Mapping[str, torch.Tensor]  # by name, read when asked for


@dataclass(frozen=True)
class Scheme:
    """What a configuration says of how weights are kept, beyond what their shapes say.

    Args:
        method: one of METHODS.
        block: rows and columns that have a scale in common; None where the shapes divide.
        bits: that a packed integer may have.
        zero_offset: what GPTQ adds to zero points.
    """

    method: str
    block: tuple[int, int] | None = None
    bits: tuple[int, ...] = (4,)
    zero_offset: int = 0

    @staticmethod
    def of(config: Any) -> "Scheme | None":
        """Of a model's configuration of transformers; None for a model that is not quantized, or by other methods."""
        given = getattr(config, "quantization_config", None)
        if given is None:
            return None
        facts = given if isinstance(given, dict) else given.to_dict()
        method = facts.get("quant_method")
        if method not in METHODS:
            return None
        blocks = [facts.get("weight_block_size")]
        bits = [facts.get("bits")]
        for group in (facts.get("config_groups") or {}).values():
            weights = group.get("weights") or {}
            block = weights.get("block_structure")
            blocks.append([int(size) for size in block.split("x")] if isinstance(block, str) else block)
            bits.append(weights.get("num_bits"))
        known = [tuple(block) for block in blocks if block]
        wide = tuple(sorted({number for number in bits if number})) or (4,)
        offset = 0 if facts.get("checkpoint_format") == "gptq_v2" else 1
        return Scheme(str(method), known[0] if known else None, wide, offset)


def dense_weights(model: str, scheme: Scheme, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """All weights of a quantized checkpoint, as the model without quantization would have them.

    Args:
        model: hub id or folder, with safetensors files.
        scheme: see `Scheme.of`.
        dtype: of the weights that are quantized; others keep their own.
        device: where it is computed.

    Returns:
        Tensors on the CPU, by the names that they have without quantization.

    Raises:
        UnreadWeightsError: some are kept in a way that is not read here; names the first.
        OSError: a file is not there.
    """
    from safetensors import safe_open

    with ExitStack() as files:
        homes: dict[str, Any] = {}
        for path in weight_files(model):
            file = files.enter_context(safe_open(path, "pt"))
            homes |= dict.fromkeys(file.keys(), file)
        weights = _Lazy(homes)
        return {name: tensor for part in homes for name, tensor in _dense(part, weights, scheme, dtype, device)}


def weight_files(model: str) -> list[Path]:
    """The safetensors files of a model, fetched where it is one of the hub's. OSError where there are none."""
    import json

    from transformers.utils import cached_file

    try:
        index = cached_file(model, "model.safetensors.index.json")
    except OSError:
        return [Path(cached_file(model, "model.safetensors"))]
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    return [Path(cached_file(model, name)) for name in names]


class _Lazy(Mapping[str, torch.Tensor]):
    """Tensors of open safetensors files. homes: name -> file."""

    def __init__(self, homes: dict[str, Any]) -> None:
        self.homes = homes

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.homes[name].get_tensor(name)

    def __contains__(self, name: object) -> bool:  # Mapping's own would read the tensor
        return name in self.homes

    def __iter__(self) -> Iterator[str]:
        return iter(self.homes)

    def __len__(self) -> int:
        return len(self.homes)


def _dense(
    name: str, weights: Weights, scheme: Scheme, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) that a tensor of a checkpoint stands for; none where it is what belongs to another."""
    stem, _, kind = name.rpartition(".")

    def part(suffix: str) -> torch.Tensor | None:
        found = f"{stem}.{suffix}"
        return weights[found].to(device) if found in weights else None

    if kind == "qweight":
        made = (_awq if scheme.method == "awq" else _gptq)(part, scheme, name)
        yield f"{stem}.weight", made.to(dtype).cpu()
    elif kind == "weight_packed" and f"{stem}.weight_shape" in weights:
        yield f"{stem}.weight", _packed(part, scheme, name).to(dtype).cpu()
    elif kind.endswith("_blocks") and name.removesuffix("_blocks") + "_scales" in weights:
        plain = name.removesuffix("_blocks")
        yield plain, mxfp4(weights[name].to(device), weights[plain + "_scales"].to(device)).to(dtype).cpu()
    elif kind == "weight" and (f"{name}_scale" in weights or f"{name}_scale_inv" in weights):
        if f"{stem}.weight_g_idx" in weights:
            raise _unknown(name, "in groups whose columns are reordered, without being packed,")
        inverse = part("weight_scale_inv")
        scale = part("weight_scale") if inverse is None else inverse
        yield name, _scaled(part("weight"), scale, part("weight_zero_point"), scheme, name).to(dtype).cpu()
    elif not name.endswith(BESIDE) and not (kind.endswith("_scales") and f"{name[: -len('scales')]}blocks" in weights):
        plain_weight = weights[name]
        if not plain_weight.is_floating_point() or plain_weight.dtype.itemsize == 1:
            raise _unknown(name, f"{plain_weight.dtype} without a scale".removeprefix("torch."))
        yield name, plain_weight


def _unknown(name: str, words: str) -> "UnreadWeightsError":
    return UnreadWeightsError(f"{name} is {words}, which is not read here")


def _scaled(
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    scheme: Scheme,
    name: str,
) -> torch.Tensor:
    """float32 [out, in] of FP8 or int8 numbers with a scale, or a zero point too, per tensor, row, group or block."""
    assert weight is not None and scale is not None
    if weight.dtype == torch.uint8 or weight.ndim != 2 or scale.ndim > 2:
        words = f"{weight.dtype} of shape {tuple(weight.shape)} with scales of shape {tuple(scale.shape)}"
        raise _unknown(name, words.removeprefix("torch."))
    numbers = weight.float()
    if zero is not None:
        numbers = numbers - spread(zero.float(), weight.shape, scheme.block)
    return numbers * spread(scale.float(), weight.shape, scheme.block)


def spread(scale: torch.Tensor, shape: torch.Size, block: tuple[int, int] | None) -> torch.Tensor:
    """What each number of a matrix is multiplied by.

    Args:
        scale: [] or [1] for all, [out] or [out, 1] by rows, else [rows, columns] of blocks.
        shape: (out, in).
        block: rows and columns of a block, of which the last may be cut; None where the shapes divide.

    Returns:
        What broadcasts to `shape`.
    """
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim == 1:
        return scale[:, None]
    if scale.shape[1] == 1 and scale.shape[0] == shape[0]:
        return scale
    cut = [-(-size // parts) for size, parts in zip(shape, scale.shape, strict=True)]
    if block is not None and all(-(-shape[at] // block[at]) == scale.shape[at] for at in (0, 1)):
        cut = list(block)
    rows = scale.repeat_interleave(cut[0], 0)[: shape[0]]
    return rows.repeat_interleave(cut[1], 1)[:, : shape[1]]


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned integers that int32 hold side by side, the lowest bits first: [..., n] -> int32 [..., n, 32 // bits]."""
    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32, device=packed.device)
    return (packed[..., None] >> shifts) & ((1 << bits) - 1)


def _awq(part: Any, scheme: Scheme, name: str) -> torch.Tensor:
    """float32 [out, in]; columns of [in, out] are packed, eight to 32 bits in AWQ_ORDER."""
    packed, zeros, scales = part("qweight"), part("qzeros"), part("scales")
    if scheme.bits != (4,) or zeros is None or scales is None or packed.shape[1] * 8 != scales.shape[1]:
        raise _unknown(name, f"AWQ of {scheme.bits[0]} bits and shape {tuple(packed.shape)}")
    order = torch.tensor(AWQ_ORDER, device=packed.device)
    whole, zero = (unpack(given, 4)[..., order].flatten(1).float() for given in (packed, zeros))
    group = len(whole) // len(scales)
    return ((whole - zero.repeat_interleave(group, 0)) * scales.float().repeat_interleave(group, 0)).T.contiguous()


def _gptq(part: Any, scheme: Scheme, name: str) -> torch.Tensor:
    """float32 [out, in]; rows of [in, out] are packed, zero points by columns, in the order of `g_idx` if there is."""
    packed, zeros, scales, order = part("qweight"), part("qzeros"), part("scales"), part("g_idx")
    bits = scheme.bits[0]
    if 32 % bits or zeros is None or scales is None:
        raise _unknown(name, f"GPTQ of {bits} bits")
    if order is not None and len(packed) * (32 // bits) != len(order):
        raise _unknown(name, f"GPTQ of other bits than the {bits} that config.json says")
    whole = unpack(packed.T.contiguous(), bits).flatten(1).T.float()
    zero = unpack(zeros, bits).flatten(1)[:, : scales.shape[1]].float() + scheme.zero_offset
    if order is None:
        order = torch.arange(len(whole), device=packed.device) // (len(whole) // len(scales))
    return ((whole - zero[order.long()]) * scales.float()[order.long()]).T.contiguous()


def _packed(part: Any, scheme: Scheme, name: str) -> torch.Tensor:
    """float32 [out, in] of compressed-tensors: signed integers, kept as unsigned ones, packed by rows."""
    packed, scale, zero, order = (part(f"weight_{kind}") for kind in ("packed", "scale", "zero_point", "g_idx"))
    out, columns = part("weight_shape").tolist()
    fitting = [bits for bits in scheme.bits if -(-columns // (32 // bits)) == packed.shape[1]]
    if not fitting or packed.dtype != torch.int32 or scale is None:
        raise _unknown(name, f"{packed.dtype} of shape {tuple(packed.shape)}".removeprefix("torch."))
    bits = fitting[0]
    whole = unpack(packed, bits).flatten(1)[:, :columns].float()
    centre = 1 << (bits - 1)
    scale = scale.float().reshape(out, -1) if scale.numel() > 1 else scale.float().expand(out, 1)
    if zero is None:
        zero = torch.full_like(scale, centre)
    elif zero.dtype == torch.int32:  # packed by columns
        zero = unpack(zero.T.contiguous(), bits).flatten(1).T[:out].float()
    else:
        zero = zero.float().reshape(out, -1) + centre
    if order is None:
        order = torch.arange(columns, device=packed.device) // -(-columns // scale.shape[1])
    return (whole - zero[:, order.long()]) * scale[:, order.long()]


def mxfp4(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Experts' weights of gpt-oss, as transformers has them.

    Args:
        blocks: uint8 [experts, out, in / 32, 16], two numbers of e2m1 each, the lower bits first.
        scales: uint8 [experts, out, in / 32], powers of two.

    Returns:
        float32 [experts, in, out].
    """
    table = torch.tensor([*FP4, *(-number for number in FP4)], device=blocks.device)
    experts = []
    for block, scale in zip(blocks, scales, strict=True):  # of all at once the indices alone would fill a GPU
        numbers = torch.stack((table[(block & 15).long()], table[(block >> 4).long()]), -1).flatten(-2)
        experts.append(torch.ldexp(numbers, scale.int()[..., None] - MXFP4_BIAS).flatten(1).T)
    return torch.stack(experts)
