"""A random Llama or Mixtral of heads of 16 that reads single letters: a model for what needs one and no meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_letters_model(folder: Path, layers: int, kv_heads: int = 1, experts: int = 0, **changes: Any) -> Path:
    """Write the model, two query heads per KV head, and its tokenizer; returns the folder.

    experts: per layer, of which two see a token: the model is a Mixtral.
    changes: of the configuration; with heads of another size, the model is one that LEXICO serves.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32 * kv_heads,
        "intermediate_size": 32 * kv_heads,
        "num_hidden_layers": layers,
        "num_attention_heads": 2 * kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    }
    if experts:
        of_experts = {"num_local_experts": experts, "num_experts_per_tok": 2, "sliding_window": None}
        MixtralForCausalLM(MixtralConfig(**config | of_experts | changes)).save_pretrained(folder)
    else:
        LlamaForCausalLM(LlamaConfig(**config | changes)).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({chr(97 + at): at + 2 for at in range(26)} | {"?": 1}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
