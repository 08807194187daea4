"""Tiny random models of the families of which some layers are coded, or that read images too."""

from pathlib import Path
from typing import Any

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
HEADS = SHAPE | {"head_dim": 16}
WINDOW = {"sliding_window": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
DELTA = {
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e5,
    "truncate": False,
}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 1e4}
EYES = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
SEES = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
MROPE = {"rope_type": "default", "rope_theta": 1e4}

# Name -> class of the configuration, what is set in it, the layers that are coded.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "gemma2": ("Gemma2Config", HEADS | WINDOW | {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}, (1, 3)),
    "gemma3": ("Gemma3TextConfig", HEADS | WINDOW | {"query_pre_attn_scalar": 16, "num_hidden_layers": 6}, (5,)),
    "gpt-oss": (
        "GptOssConfig",
        HEADS | WINDOW | {"num_local_experts": 2, "num_experts_per_tok": 2, "rope_parameters": YARN},
        (1, 3),
    ),
    "olmo3": ("Olmo3Config", SHAPE | WINDOW, (3,)),
    "cohere2": ("Cohere2Config", HEADS | WINDOW, (3,)),
    "exaone4": ("Exaone4Config", HEADS | WINDOW, (3,)),
    "llama4": (
        "Llama4TextConfig",
        HEADS | {"intermediate_size_mlp": 32, "num_local_experts": 2, "attention_chunk_size": 8},
        (3,),
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        HEADS | DELTA | EXPERTS | {"shared_expert_intermediate_size": 16, "num_experts": 2},
        (1,),
    ),
    "qwen3.5": ("Qwen3_5TextConfig", HEADS | DELTA, (1,)),
    "nemotron-h": (
        "NemotronHConfig",
        {name: value for name, value in HEADS.items() if name != "num_hidden_layers"}
        | EXPERTS
        | {"hybrid_override_pattern": "M*E-", "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8,
           "n_groups": 2, "chunk_size": 16, "n_routed_experts": 2, "moe_shared_expert_intermediate_size": 16,
           "n_group": 1, "topk_group": 1},
        (1,),
    ),
    "bamba": ("BambaConfig", SHAPE | MAMBA | {"attn_layer_indices": [1, 3]}, (1, 3)),
    "granite4": (
        "GraniteMoeHybridConfig",
        SHAPE
        | MAMBA
        | {"layer_types": ["mamba", "attention"] * 2, "num_local_experts": 2, "num_experts_per_tok": 2,
           "shared_intermediate_size": 16},
        (1, 3),
    ),
    "lfm2": ("Lfm2Config", SHAPE | {"full_attn_idxs": [1, 3], "block_multiple_of": 16}, (1, 3)),
    "phi4-mini": (
        "Phi3Config",
        SHAPE | {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE, "sliding_window": 1 << 18},
        (0, 1, 2, 3),
    ),
    "qwen2.5-vl": (
        "Qwen2_5_VLConfig",
        {"text_config": SHAPE | {"rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}},
         "vision_config": EYES | {"fullatt_block_indexes": [0]}} | SEES,
        (0, 1, 2, 3),
    ),
    "qwen3-vl": (
        "Qwen3VLConfig",
        {"text_config": HEADS | {"rope_parameters": MROPE | {"mrope_section": [4, 2, 2], "mrope_interleaved": True}},
         "vision_config": EYES | {"deepstack_visual_indexes": [0]}} | SEES,
        (0, 1, 2, 3),
    ),
    "gemma3-vl": (
        "Gemma3Config",
        {"text_config": HEADS | WINDOW | {"query_pre_attn_scalar": 16, "num_hidden_layers": 6},
         "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                           "image_size": 28, "patch_size": 14},
         "mm_tokens_per_image": 1, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62},
        (5,),
    ),
}  # fmt: skip


def write_family(name: str, folder: Path) -> Path:
    """Write a checkpoint of a family, with its vision tower where it has one; returns its folder."""
    import torch
    import transformers
    from transformers.models.auto import modeling_auto

    kind, settings, _ = FAMILIES[name]
    config = getattr(transformers, kind)(**settings)
    images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    made = images[type(config)] if type(config) in images else modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    torch.manual_seed(0)
    model = made(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2)
    model.save_pretrained(folder)
    return folder
