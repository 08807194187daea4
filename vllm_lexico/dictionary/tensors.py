"""Which tensors a dictionary file may hold, and which numbers: checked when a file is written and when it is read."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from lexico_kernels.memory.layout import KV, MAX_SPARSITY, NUM_LEVELS

from vllm_lexico.dictionary.atoms import has_lowest, largest_number
from vllm_lexico.dictionary.info import REMEDY, DictionaryInfo

ASKED_SHARES = "asked_shares"
LEVEL_DISORDER = 2.0**-20  # what interpolation in float32 may put between equal levels
USAGE_EXCESS = 2.0**-6  # what rounding to float16 may add to a sum of shares
LEAST_STRETCH = np.finfo(np.float32).tiny  # what is smaller has no finite inverse

# Words, and where they are true: bool [layers, ...], False everywhere in a good dictionary.
Faults = list[tuple[str, np.ndarray]]


def is_shared(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether all KV heads of a layer share their atoms."""
    return tensors["key_atoms"].ndim == 3 if "key_atoms" in tensors else True


def check_types(tensors: Mapping[str, torch.Tensor], info: DictionaryInfo) -> None:
    """Check names, dtypes and shapes against what the format says of a dictionary with this metadata.

    Raises:
        ValueError: one is absent, unknown, or of another dtype or shape.
    """
    shape = info.fingerprint
    if shape.head_dim * info.atom_bits % 8:
        raise ValueError(f"atoms of 4 bits ask for an even head_dim, the metadata says {shape.head_dim}; {REMEDY}")
    coded, heads = len(shape.layers), () if is_shared(tensors) else (shape.num_kv_heads,)
    atoms = (coded, *heads, info.atoms, shape.head_dim * info.atom_bits // 8)
    rows = (coded, shape.num_kv_heads, shape.head_dim)
    wanted = {
        "atoms": (torch.int8 if info.atom_bits == 8 else torch.uint8, atoms),
        "mean": (torch.float32, rows),
        "stretch": (torch.float32, rows),
        "levels": (torch.float32, (coded, MAX_SPARSITY + 1, NUM_LEVELS)),
        "usage": (torch.float16, atoms[:-1]),
    }
    for kv in KV:
        for kind, (dtype, size) in wanted.items():
            name = f"{kv}_{kind}"
            _check_type(tensors.get(name), name, dtype, size, optional=kind == "usage")
    _check_type(tensors.get(ASKED_SHARES), ASKED_SHARES, torch.float32, (coded, shape.num_kv_heads), optional=True)
    known = {f"{kv}_{kind}" for kv in KV for kind in wanted} | {ASKED_SHARES}
    if unknown := sorted(set(tensors) - known):
        raise ValueError(f"the dictionary has a tensor {unknown[0]!a}, which its format does not know; {REMEDY}")


def _check_type(
    tensor: torch.Tensor | None, name: str, dtype: torch.dtype, size: tuple[int, ...], *, optional: bool
) -> None:
    """ValueError for one that is not as the format says."""
    if tensor is None and optional:
        return
    if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != size:
        given = "absent" if tensor is None else _words(tensor.dtype, tuple(tensor.shape))
        raise ValueError(
            f"the dictionary's tensor {name} is {given}, its metadata asks for {_words(dtype, size)}; {REMEDY}"
        )


def check_numbers(tensors: Mapping[str, torch.Tensor], atom_bits: int, layers: Sequence[int]) -> None:
    """Check that the numbers can be those of a dictionary; costs some 30 ms per 100 MB.

    An atom of zeros beside the null atom is allowed: it is what a head without anything to code leaves behind.

    Args:
        tensors: of all coded layers or of some, on the CPU and of the types that `check_types` asks for.
        atom_bits: 4 or 8.
        layers: the model's number of each row, for sentences.

    Raises:
        ValueError: in one sentence, with the layer and whether it is keys or values.
    """
    if (shares := tensors.get(ASKED_SHARES)) is not None:
        outside = ~((shares >= 0) & (shares <= 1)).numpy()
        if outside.any():
            layer = layers[int(outside.any(1).argmax())]
            raise ValueError(
                f"the dictionary cannot be right: in layer {layer}, a share of tokens that are asked for is outside 0 "
                f"to 1; {REMEDY}"
            )
    for kv in KV:
        arrays = {kind: tensors[f"{kv}_{kind}"].numpy() for kind in ("mean", "stretch", "levels")}
        for words, where in (*_faults(**arrays), *_faults_of_usage(tensors.get(f"{kv}_usage"))):
            if where.any():
                layer = layers[int(where.reshape(len(where), -1).any(1).argmax())]
                raise ValueError(_sentence(layer, kv, words))
        for layer, stored in zip(layers, tensors[f"{kv}_atoms"], strict=True):
            if has_lowest(stored, atom_bits):
                most = largest_number(atom_bits)
                words = f"an atom has the number {-most - 1}, allowed are {-most} to {most}"
                raise ValueError(_sentence(layer, kv, words))
            if stored[..., 0, :].any():
                raise ValueError(_sentence(layer, kv, "the null atom, the first, is not zeros"))


def _faults(mean: np.ndarray, stretch: np.ndarray, levels: np.ndarray) -> Faults:
    return [
        ("a mean is NaN or infinite", ~np.isfinite(mean)),
        ("a stretch is not a finite number above 0", ~(np.isfinite(stretch) & (stretch >= LEAST_STRETCH))),
        ("a level is outside -1 to 1", ~(np.abs(levels) <= 1)),
        ("levels do not ascend", np.diff(levels, axis=-1) < -LEVEL_DISORDER),
    ]


def _faults_of_usage(usage: torch.Tensor | None) -> Faults:
    if usage is None:
        return []
    shares = usage.numpy().astype(np.float32).reshape(len(usage), -1)
    return [
        ("a share of use is outside 0 to 1", ~((shares >= 0) & (shares <= 1))),
        ("shares of use add up to more than 1", ~(shares.sum(1) <= 1 + USAGE_EXCESS)),
        ("the null atom has a share of use", usage.numpy()[..., 0] != 0),
    ]


def _sentence(layer: int, kv: str, words: str) -> str:
    return f"the dictionary cannot be right: in layer {layer}, {kv}s, {words}; {REMEDY}"


def _words(dtype: torch.dtype, size: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {size}"
