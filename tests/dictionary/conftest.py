"""Small dictionaries, and files of them changed by hand."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vllm_lexico.dictionary.atoms import pack_atoms
from vllm_lexico.dictionary.file import Dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.info import DictionaryInfo

FINGERPRINT = ModelFingerprint("llama", 2, 3, 16, 96, '{"rope_theta": 10000.0, "rope_type": "default"}')
NAME = "someone/some-model"


@pytest.fixture(scope="session")
def name() -> str:
    """Of the model that `make_dictionary` makes dictionaries for."""
    return NAME


@pytest.fixture(scope="session")
def fingerprint() -> ModelFingerprint:
    """Of that model."""
    return FINGERPRINT


@pytest.fixture(scope="session")
def make_dictionary() -> Callable[..., Dictionary]:
    """Make a dictionary of 20 random atoms."""

    def make(
        atom_bits: int = 4,
        name: str = NAME,
        fingerprint: ModelFingerprint = FINGERPRINT,
        shared: bool = True,
        usage: bool = False,
        asked: bool = False,
    ) -> Dictionary:
        generator = torch.Generator().manual_seed(0)
        layers, heads, dim = len(fingerprint.layers), fingerprint.num_kv_heads, fingerprint.head_dim
        top, tensors = 2 ** (atom_bits - 1) - 1, {}
        for kv in ("key", "value"):
            size = (layers, 20, dim) if shared else (layers, heads, 20, dim)
            integers = torch.randint(-top, top + 1, size, generator=generator).to(torch.int8)
            integers[..., 0, :] = 0
            tensors[f"{kv}_atoms"] = pack_atoms(integers, atom_bits)
            tensors[f"{kv}_mean"] = torch.randn(layers, heads, dim, generator=generator)
            tensors[f"{kv}_stretch"] = 0.5 + torch.rand(layers, heads, dim, generator=generator)
            tensors[f"{kv}_levels"] = torch.linspace(-1, 1, 16).repeat(layers, 32, 1)
            if usage:
                share = torch.rand(size[:-1], generator=generator)
                share[..., 0] = 0
                tensors[f"{kv}_usage"] = (share / share.flatten(1).sum(1).view(-1, *[1] * (share.ndim - 1))).half()
        if asked:
            tensors["asked_shares"] = torch.rand(layers, heads, generator=generator)
        errors = {"key": {"7": [0.25, 0.5]}}
        info = DictionaryInfo(name, fingerprint, 20, atom_bits, 5, "a test", 100, 300, errors, "test", 3)
        return Dictionary(info, tensors)

    return make


@pytest.fixture(scope="session")
def change_header() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """Change the header of a safetensors file, a JSON object, and leave the tensors' bytes as they are."""

    def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        edit(header)
        written = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(written)) + written + content[8 + length :])

    return change
