"""A dictionary that is adapted, as learning starts from it."""

from pathlib import Path

import torch
from lexico_kernels.memory.layout import KV

from vllm_lexico.dictionary.atoms import unit_atoms, unpack_atoms
from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.train.layer_learners import Parent


def read_parent(path: Path, layers: list[int]) -> Parent:
    """Some layers of a dictionary that is adapted. layers: the model's numbers of them."""
    dictionary = load_dictionary(path)
    rows = [dictionary.info.fingerprint.layers.index(layer) for layer in layers]
    kept, bits = dictionary.tensors, dictionary.info.atom_bits
    atoms = torch.stack([unit_atoms(unpack_atoms(kept[f"{kv}_atoms"][rows], bits)) for kv in KV], 1)
    stretch = torch.stack([kept[f"{kv}_stretch"][rows] for kv in KV], 1)
    return Parent(atoms[:, :, None] if dictionary.shared else atoms, stretch)
