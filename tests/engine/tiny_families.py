"""Tiny checkpoints of the families that people serve, with strong random weights, so that attention decides answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

COMMON = {
    "vocab_size": 100,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.12,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
EVERY_SECOND = ["sliding_attention", "full_attention"] * 2
WINDOWS = {"layer_types": EVERY_SECOND, "sliding_window": 100}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "shared_expert_intermediate_size": 64,
}

MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 64,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}
CONVOLUTIONS = {
    "layer_types": ["conv", "full_attention"] * 2,
    "block_auto_adjust_ff_dim": False,
    "block_dim": 256,
    "conv_dim": 256,
    "conv_dim_out": 256,
}


class Family(NamedTuple):
    """How a checkpoint is made.

    Attributes:
        name: how transformers' classes begin.
        changes: of COMMON; None takes a value out.
        coded: the layers that LEXICO codes.
        dtype: in which the CPU build runs it.
        text: what the configuration's class has after the name.
    """

    name: str
    changes: dict[str, Any] = {}  # noqa: RUF012
    coded: tuple[int, ...] = (0, 1, 2, 3)
    dtype: str = "float32"
    text: str = ""


HALF = (1, 3)
FAMILIES = {
    "Llama": Family("Llama", {"hidden_size": 480, "num_attention_heads": 6}),
    "Mistral": Family("Mistral", {"head_dim": 128, "sliding_window": None}),
    "Mistral with a window that never binds": Family("Mistral", {"sliding_window": 4096}),
    "Mixtral": Family("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "Qwen2": Family("Qwen2"),
    "Qwen3": Family("Qwen3", {"head_dim": 96}),
    "Qwen3-MoE": Family("Qwen3Moe", {"head_dim": 64, **EXPERTS}),
    "Qwen3-Next": Family("Qwen3Next", {"head_dim": 256, **EXPERTS, **LINEAR}, HALF, "bfloat16"),
    "Gemma 3": Family("Gemma3", {"head_dim": 256, "query_pre_attn_scalar": 256, **WINDOWS}, HALF, text="Text"),
    "Gemma 2": Family(
        "Gemma2",
        {
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "attn_logit_softcapping": 5.0,
            "tie_word_embeddings": True,
            **WINDOWS,
        },
        HALF,
    ),
    "gpt-oss": Family("GptOss", {"head_dim": 64, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS}, HALF),
    "Phi3": Family("Phi3", {"sliding_window": None}),
    "Phi-4-mini": Family(
        "Phi3",
        {
            "sliding_window": 262144,
            "original_max_position_embeddings": 512,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + at / 24 for at in range(24)],
                "long_factor": [1.0 + at / 4 for at in range(24)],
            },
        },
    ),
    "GLM4": Family("Glm4", {"head_dim": 64}),
    "Olmo 3": Family("Olmo3", WINDOWS, HALF),
    "Cohere2": Family("Cohere2", {"head_dim": 64, **WINDOWS}, HALF),
    "EXAONE 4": Family("Exaone4", {"head_dim": 64, **WINDOWS}, HALF),
    "SmolLM3": Family("SmolLM3"),
    "Llama 4": Family(
        "Llama4",
        {
            "head_dim": 64,
            "attention_chunk_size": 128,
            "no_rope_layers": [1, 0, 1, 0],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 1,
        },
        HALF,
        text="Text",
    ),
    "LFM2": Family("Lfm2", CONVOLUTIONS, HALF),
    "Granite 4": Family(
        "GraniteMoeHybrid",
        {
            "layer_types": ["mamba", "attention"] * 2,
            "attention_multiplier": 0.125,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 128,
            **MAMBA2,
        },
        HALF,
    ),
    "Falcon-H1": Family("FalconH1", {"head_dim": 64, "mamba_d_ssm": 512, **MAMBA2}),
    "Nemotron-H": Family(
        "NemotronH",
        {
            "num_hidden_layers": None,
            "head_dim": 64,
            "hybrid_override_pattern": "M*-*",
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "n_groups": 1,
            "ssm_state_size": 64,
            "chunk_size": 64,
        },
        HALF,
    ),
    "Falcon": Family("Falcon", {"alibi": False, "multi_query": True, "parallel_attn": True, "bias": False}),
    "GPT-2": Family(
        "GPT2",
        {
            "n_embd": 256,
            "n_head": 4,
            "n_layer": 4,
            "n_positions": 1024,
            "hidden_size": None,
            "num_key_value_heads": None,
        },
    ),
}


def write_checkpoint(family: Family, folder: Path) -> Path:
    """Write a random checkpoint of a family without a tokenizer."""
    import torch
    import transformers

    torch.manual_seed(0)
    settings = {key: value for key, value in (COMMON | family.changes).items() if value is not None}
    if family.changes.get("sliding_window", 0) is None:
        settings["sliding_window"] = None  # which some have by default
    config = getattr(transformers, f"{family.name}{family.text}Config")(**settings)
    kind: Callable[..., Any] = getattr(
        transformers, f"{family.name}LMHeadModel" if family.name == "GPT2" else f"{family.name}ForCausalLM"
    )
    config.architectures = [kind.__name__]
    model = kind(config)
    if config.tie_word_embeddings:  # else a token's own embedding decides that it is said again
        model.get_input_embeddings().weight.data.mul_(0.05)
    model.save_pretrained(folder)
    return folder
