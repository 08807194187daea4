"""A checkpoint whose KV heads divide among ranks: heads are added that change no answer.

Tensor parallelism splits a model by its KV heads, and a small model may have three of them. An added head repeats an
earlier one, so that its keys and values are such as a cache meets; the weights that its output meets are zero.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint

KEPT = ("*token*", "generation_config.json", "vocab.json", "merges.txt", "chat_template*")  # files beside the weights


def added_heads(config: dict[str, Any], ranks: int) -> int:
    """KV heads that a model lacks until `ranks` divide them. config: its config.json."""
    return -config["num_key_value_heads"] % ranks


def write_model_with_more_heads(model: Path, ranks: int, out: Path) -> Path:
    """Write a model that answers as another one and has so many KV heads that `ranks` divide them.

    Args:
        model: a checkpoint's folder with config.json and safetensors files, of Llama's or Qwen2's names.
        ranks: of tensor parallelism.
        out: folder to write.

    Returns:
        The folder, or that of `model` where nothing is to be added.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if not (more := added_heads(config, ranks)):
        return model
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    rows = {"q": more * (heads // kv_heads) * head_dim, "k": more * head_dim, "v": more * head_dim}
    weights = _weights(model)
    for name, weight in weights.items():
        part = name.split(".")[-2].removesuffix("_proj") if "self_attn" in name else ""
        if part in rows:
            weights[name] = torch.cat((weight, weight[: rows[part]]))
        elif part == "o":
            weights[name] = torch.cat((weight, weight.new_zeros(len(weight), rows["q"])), 1)
    changed = {"num_attention_heads": heads + more * (heads // kv_heads), "num_key_value_heads": kv_heads + more}
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config | changed | {"head_dim": head_dim}, indent=1), encoding="utf-8")
    from safetensors.torch import save_file

    save_file(weights, out / "model.safetensors", {"format": "pt"})
    for path in {path for pattern in KEPT for path in model.glob(pattern)}:
        shutil.copy(path, out)
    return out


def _weights(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(model.glob("*.safetensors"))
    own = [file for file in files if file.name.startswith("model")]  # a dictionary may lie beside them
    return {name: weight for file in own for name, weight in load_file(file).items()}


def write_dictionary_with_more_heads(dictionary: Path, model: Path, out: Path) -> Path:
    """Write a model's dictionary for what `write_model_with_more_heads` has made of the model.

    Args:
        dictionary: of the model as it was.
        model: the folder with more heads.
        out: the file to write.

    Returns:
        The file, or `dictionary` where it has as many heads already.
    """
    from transformers import AutoConfig

    loaded = load_dictionary(dictionary)
    fingerprint = ModelFingerprint.of(AutoConfig.from_pretrained(model))
    more = fingerprint.num_kv_heads - loaded.info.fingerprint.num_kv_heads
    if not more:
        return dictionary
    tensors = {}
    for name, tensor in loaded.tensors.items():
        by_head = name.endswith(("_mean", "_stretch", "_shares")) or (name.endswith("_atoms") and not loaded.shared)
        if not name.endswith("_usage"):  # optional, and counted over the heads that there were
            tensors[name] = torch.cat((tensor, tensor[:, :more]), 1) if by_head else tensor
    Dictionary(replace(loaded.info, fingerprint=fingerprint), tensors).save(out)
    return out
