"""Tiny checkpoints of models that read images too, with image processors and tokenizers that know their own tokens."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import tiny_families

TEXT = tiny_families.COMMON | {"head_dim": 64}
EYES = {"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": TEXT["hidden_size"]}
MROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN = {"<|vision_start|>": 96, "<|vision_end|>": 97, "<|image_pad|>": 98, "<|video_pad|>": 99}
QWEN_IDS = {"vision_start_token_id": 96, "vision_end_token_id": 97, "image_token_id": 98, "video_token_id": 99}
GEMMA = {"<start_of_image>": 96, "<end_of_image>": 97, "<image_soft_token>": 98}
GEMMA_IDS = {"boi_token_index": 96, "eoi_token_index": 97, "image_token_index": 98}


class ImageFamily(NamedTuple):
    """How a checkpoint is made.

    Attributes:
        name: how transformers' classes begin.
        text: changes of TEXT.
        eyes: the vision tower's configuration.
        ids: of tokens with a meaning, by the configuration's names for them.
        special: the same by their text.
        patch: side of an image's smallest square.
        processor: changes of the image processor's file.
        coded: the layers that LEXICO codes.
    """

    name: str
    text: dict[str, Any]
    eyes: dict[str, Any]
    ids: dict[str, Any]
    special: dict[str, int]
    patch: int
    processor: dict[str, Any]
    coded: tuple[int, ...] = (0, 1, 2, 3)


def _qwen_images(video: str, patch: int) -> dict[str, Any]:
    area = (2 * patch) ** 2
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "video_processor_type": f"{video}VideoProcessor",
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": area, "longest_edge": 128 * area},
    }


FAMILIES = {
    "Qwen2.5-VL": ImageFamily(
        "Qwen2_5_VL",
        {"rope_parameters": MROPE | {"mrope_section": [8, 12, 12]}},
        EYES | {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]},
        QWEN_IDS,
        QWEN,
        14,
        _qwen_images("Qwen2VL", 14),
    ),
    "Qwen3-VL": ImageFamily(
        "Qwen3VL",
        {"rope_parameters": MROPE | {"mrope_section": [12, 10, 10], "mrope_interleaved": True}},
        EYES | {"patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]},
        QWEN_IDS,
        QWEN,
        16,
        _qwen_images("Qwen3VL", 16),
    ),
    "Gemma 3": ImageFamily(
        "Gemma3",
        tiny_families.WINDOWS | {"query_pre_attn_scalar": 64},
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        GEMMA_IDS | {"mm_tokens_per_image": 16},
        GEMMA,
        14,
        {"image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 16, "size": {"height": 56, "width": 56}},
        tiny_families.HALF,
    ),
}


def write_checkpoint(family: ImageFamily, folder: Path) -> Path:
    """Write a random checkpoint of a family, its image processor and a tokenizer of single letters."""
    import torch
    import transformers

    torch.manual_seed(0)
    text = getattr(transformers, f"{family.name}TextConfig")(**TEXT | family.text)
    config = getattr(transformers, f"{family.name}Config")(
        text_config=text.to_dict(), vision_config=family.eyes, tie_word_embeddings=False, **family.ids
    )
    model = getattr(transformers, f"{family.name}ForConditionalGeneration")(config)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name or ".visual." in name:
            torch.nn.init.normal_(parameter, std=0.3)  # so that what is in an image is seen
    config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    _write_processor(family, folder)
    return folder


def _write_processor(family: ImageFamily, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {chr(33 + index): index for index in range(min(family.special.values()))} | family.special
    tokenizer = Tokenizer(models.WordLevel(letters, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in family.special])
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    more = {"extra_special_tokens": named} if family.name == "Gemma3" else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token='"', **more).save_pretrained(folder)
    common = {"processor_class": f"{family.name}Processor", "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        (folder / name).write_text(json.dumps(common | family.processor), encoding="utf-8")
