"""Configurations of models as the hub has them, without anything that says nothing about the cache."""

from typing import Any

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE["original_max_position_embeddings"] = 8192
LONG_ROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}


def config(kind: str, architecture: str, **values: Any) -> dict[str, Any]:
    return {"model_type": kind, "architectures": [architecture], "torch_dtype": "bfloat16", **values}


def sizes(layers: int, hidden: int, wide: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, int]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
    }


FAMILIES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": config(
        "llama",
        "LlamaForCausalLM",
        **sizes(32, 4096, 14336, 32, 8, 128256),
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=LLAMA3_ROPE,
    ),
    "Qwen3-8B": config(
        "qwen3",
        "Qwen3ForCausalLM",
        **sizes(36, 4096, 12288, 32, 8, 151936),
        head_dim=128,
        max_position_embeddings=40960,
        sliding_window=None,
        use_sliding_window=False,
        max_window_layers=36,
    ),
    "Qwen2.5-7B": config(
        "qwen2",
        "Qwen2ForCausalLM",
        **sizes(28, 3584, 18944, 28, 4, 152064),
        max_position_embeddings=131072,
        sliding_window=131072,
        use_sliding_window=False,
        max_window_layers=28,
    ),
    "Mistral-7B-v0.1": config(
        "mistral",
        "MistralForCausalLM",
        **sizes(32, 4096, 14336, 32, 8, 32000),
        max_position_embeddings=32768,
        sliding_window=4096,
    ),
    "Gemma-3-27B": {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": {
            "model_type": "gemma3_text",
            **sizes(62, 5376, 21504, 32, 16, 262208),
            "head_dim": 128,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
            "max_position_embeddings": 131072,
        },
        "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "num_hidden_layers": 27},
    },
    "gpt-oss-20b": config(
        "gpt_oss",
        "GptOssForCausalLM",
        **sizes(24, 2880, 2880, 64, 8, 201088),
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        max_position_embeddings=131072,
        layer_types=["sliding_attention", "full_attention"] * 12,
        quantization_config={"quant_method": "mxfp4"},
    ),
    "Qwen3-Next-80B": config(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        **sizes(48, 2048, 5120, 16, 2, 151936),
        head_dim=256,
        full_attention_interval=4,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_value_head_dim=128,
        moe_intermediate_size=512,
        num_experts=512,
        num_experts_per_tok=10,
        max_position_embeddings=262144,
    ),
    "Nemotron-3-Nano": config(
        "nemotron_h",
        "NemotronHForCausalLM",
        **sizes(52, 2688, 1856, 32, 2, 131072),
        head_dim=128,
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        mamba_num_heads=64,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        conv_kernel=4,
        moe_intermediate_size=1856,
        n_routed_experts=128,
        num_experts_per_tok=6,
        mamba_ssm_cache_dtype="float32",
        max_position_embeddings=262144,
    ),
    "Phi-4-mini": config(
        "phi3",
        "Phi3ForCausalLM",
        **sizes(32, 3072, 8192, 24, 8, 200064),
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        partial_rotary_factor=0.75,
        rope_scaling=LONG_ROPE,
        sliding_window=262144,
        pad_token_id=199999,
        bos_token_id=199999,
        eos_token_id=199999,
    ),
    "LFM2-1.2B": config(
        "lfm2",
        "Lfm2ForCausalLM",
        **sizes(16, 2048, 12288, 32, 8, 65536),
        conv_L_cache=3,
        full_attn_idxs=[2, 5, 8, 10, 12, 14],
        max_position_embeddings=128000,
    ),
    "Llama-4-Scout": config(
        "llama4_text",
        "Llama4ForCausalLM",
        **sizes(48, 5120, 8192, 40, 8, 202048),
        head_dim=128,
        attention_chunk_size=8192,
        intermediate_size_mlp=16384,
        num_local_experts=16,
        num_experts_per_tok=1,
        max_position_embeddings=262144,
    ),
    "DeepSeek-V3": config(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        **sizes(61, 7168, 18432, 128, 128, 129280),
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        max_position_embeddings=163840,
    ),
    "Gemma-2-9B": config(
        "gemma2",
        "Gemma2ForCausalLM",
        **sizes(42, 3584, 14336, 16, 8, 256000),
        head_dim=256,
        attn_logit_softcapping=50.0,
        sliding_window=4096,
        max_position_embeddings=8192,
    ),
    "Falcon-7B": config(
        "falcon",
        "FalconForCausalLM",
        num_hidden_layers=32,
        hidden_size=4544,
        num_attention_heads=71,
        vocab_size=65024,
        multi_query=True,
        new_decoder_architecture=False,
        alibi=False,
        max_position_embeddings=2048,
    ),
    "BLOOM-7B": config(
        "bloom", "BloomForCausalLM", n_layer=30, hidden_size=4096, n_head=32, vocab_size=250880, seq_length=2048
    ),
    "T5": config("t5", "T5ForConditionalGeneration", num_layers=6, d_model=512, num_heads=8, is_encoder_decoder=True),
}
