"""Shapes of models in which a part of the layers is coded, some with fewer layers or experts than the model has."""

from __future__ import annotations

from typing import Any, NamedTuple

USUAL = {"torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rms_norm_eps": 1e-6}
GEMMA_3_27B: dict[str, Any] = USUAL | {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 24,  # of 62
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "query_pre_attn_scalar": 168,
    "sliding_window": 1024,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh",
    "vocab_size": 262208,
    "tie_word_embeddings": True,
}
GPT_OSS_20B: dict[str, Any] = USUAL | {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "num_local_experts": 16,  # of 32
    "num_experts_per_tok": 4,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "max_position_embeddings": 131072,
    "hidden_act": "silu",
    "attention_bias": True,
    "swiglu_limit": 7.0,
    "vocab_size": 201088,
    "tie_word_embeddings": False,
}
QWEN3_NEXT_80B: dict[str, Any] = USUAL | {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_hidden_layers": 48,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10000000.0,
    "max_position_embeddings": 262144,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "num_experts": 32,  # of 512
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
NEMOTRON_3_NANO: dict[str, Any] = USUAL | {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hidden_size": 2688,
    "intermediate_size": 1856,
    "num_hidden_layers": 52,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
    "conv_kernel": 4,
    "chunk_size": 128,
    "use_conv_bias": True,
    "mamba_hidden_act": "silu",
    "mlp_hidden_act": "relu2",
    "n_routed_experts": 16,  # of 128
    "num_experts_per_tok": 6,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "n_group": 1,
    "topk_group": 1,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 262144,
    "vocab_size": 131072,
    "tie_word_embeddings": False,
}


class Shape(NamedTuple):
    """A model's shape. name: of the model, with what is less in the shape. sparsity: that codes 12.5 % of 16 bits."""

    name: str
    config: dict[str, Any]
    sparsity: int


SHAPES = {
    "gemma": Shape("Gemma 3 27B, 24 of 62 layers", GEMMA_3_27B, 15),
    "gpt-oss": Shape("gpt-oss-20b, 16 of 32 experts", GPT_OSS_20B, 7),
    "qwen": Shape("Qwen3-Next-80B, 32 of 512 experts", QWEN3_NEXT_80B, 31),
    "nemotron": Shape("Nemotron 3 Nano, 16 of 128 experts", NEMOTRON_3_NANO, 15),
}
