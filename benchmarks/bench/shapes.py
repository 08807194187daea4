"""Models by their shape alone: a config.json for dummy weights, and a random dictionary that fits it.

Memory depends on shapes alone, and speed nearly: where tokens are alike, as those of models with biases are under dummy
weights, so are their codes, and decode is slower (`drawn_weights.py`). Nothing here says anything about quality.
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


def write_random_weights(model: Path, tokenizer: Path | None = None, shards: int = 8) -> int:
    """Write weights into a folder of `write_model`, drawn on the GPU where there is one; returns their bytes.

    tokenizer: folder of a model whose tokenizer, of no more tokens, is copied.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with no_init_weights(), torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    names = {name: weight.shape for name, weight in built.named_parameters()}
    files = {name: f"model-{at * shards // len(names) + 1:05d}.safetensors" for at, name in enumerate(names)}
    torch.manual_seed(0)
    written = 0
    for file in dict.fromkeys(files.values()):
        tensors = {}
        for name in [name for name in names if files[name] == file]:
            shape, norm = names[name], len(names[name]) == 1
            drawn = torch.ones(shape, device=device) if norm else torch.randn(shape, device=device) / shape[1] ** 0.5
            tensors[name] = drawn.bfloat16().cpu()
        save_file(tensors, model / file, metadata={"format": "pt"})
        written += sum(tensor.nbytes for tensor in tensors.values())
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": written}, "weight_map": files})
    )
    for path in sorted(tokenizer.iterdir()) if tokenizer is not None else ():
        if path.name.startswith(("tokenizer", "special_tokens", "vocab", "merges", "chat_template")):
            (model / path.name).write_bytes(path.read_bytes())
    return written


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
