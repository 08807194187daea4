"""Models by their shape alone: a config.json for dummy weights, and a random dictionary that fits it.

Speed and memory depend on shapes, not on what the numbers are; nothing here says anything about quality.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vllm_lexico.dictionary.file import Dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.info import DictionaryInfo

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def write_model(folder: Path, config: dict[str, Any], num_layers: int | None = None) -> Path:
    """Write a model folder that vLLM starts with `load_format="dummy"` and `skip_tokenizer_init=True`."""
    folder.mkdir(parents=True, exist_ok=True)
    changed = config | ({} if num_layers is None else {"num_hidden_layers": num_layers})
    (folder / "config.json").write_text(json.dumps(changed, indent=1))
    return folder


def write_random_dictionary(model: Path, atoms: int = 4096, seed: int = 0) -> Path:
    """Write a dictionary of random atoms, each KV head's own, for the model in a folder, beside its config.json."""
    from transformers import AutoConfig

    fingerprint = ModelFingerprint.of(AutoConfig.from_pretrained(model).get_text_config())
    shape = (len(fingerprint.layers), fingerprint.num_kv_heads, fingerprint.head_dim)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for kv in ("key", "value"):
        size = (shape[0], shape[1], atoms, shape[2])
        integers = torch.randint(-127, 128, size, generator=generator, dtype=torch.int8)
        integers[:, :, 0] = 0  # the null atom
        tensors[f"{kv}_atoms"] = integers
        tensors[f"{kv}_mean"] = torch.zeros(shape)
        tensors[f"{kv}_stretch"] = torch.ones(shape)
        tensors[f"{kv}_levels"] = torch.linspace(-1, 1, 16).expand(shape[0], 32, 16).contiguous()
    tensors["asked_shares"] = torch.rand(shape[:2], generator=generator)
    info = DictionaryInfo(
        model_name=model.name,
        fingerprint=fingerprint,
        atoms=atoms,
        atom_bits=8,
        sparsity=15,
        data="none: random atoms, for measuring speed and memory",
        tokens_seen=0,
        vectors_seen=0,
        seed=seed,
    )
    path = model / "random.safetensors"
    Dictionary(info, tensors).save(path)
    return path
