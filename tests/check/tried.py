"""What is known of the models in configurations.py besides what `vllm-lexico check` counts: where they ran, why not."""

from typing import NamedTuple

TINY = "H200 (tiny)"  # a small random checkpoint answers as beside FLASH_ATTN


class Known(NamedTuple):
    """What is known of a model, or of a family by a tiny checkpoint.

    Attributes:
        engine: name in tests/engine/tiny_families.py or image_families.py, whose checkpoints run on a CPU; None where
            there is none.
        gpu: on which GPU its shape or a tiny checkpoint ran, with vLLM 0.33; None where none did.
        refused: why it is not served at its longest context, in up to three words; None where it is.
    """

    engine: str | None = None
    gpu: str | None = None
    refused: str | None = None


# In the order of the table.
MODELS = {
    "Llama-3.1-8B": Known("Llama", "H100, H200"),
    "Llama-3.1-70B": Known("Llama", "two H200s"),  # 16 of its 80 layers, tensor parallel; benchmarks/parallel.py
    "Qwen2.5-7B": Known("Qwen2"),
    "Qwen3-8B": Known("Qwen3"),
    "Qwen3-30B-A3B": Known("Qwen3-MoE"),
    "Qwen2.5-VL-7B": Known("Qwen2.5-VL"),
    "Qwen3-VL-8B": Known("Qwen3-VL"),
    "Mistral-7B-v0.3": Known("Mistral"),
    "Mixtral-8x7B": Known("Mixtral"),
    "Phi-4-mini": Known("Phi-4-mini"),
    "GLM-4-9B": Known("GLM4"),
    "SmolLM3-3B": Known("SmolLM3"),
    "Falcon-7B": Known("Falcon"),
    "GPT-2": Known("GPT-2"),
    "Gemma-3-27B": Known("Gemma 3", "H200"),
    "Gemma-3-12B": Known("Gemma 3", TINY),
    "Gemma-2-9B": Known("Gemma 2"),
    "gpt-oss-20b": Known("gpt-oss", "H200"),
    "Olmo-3-7B": Known("Olmo 3"),
    "Command-R7B": Known("Cohere2"),
    "EXAONE-4.0-32B": Known("EXAONE 4"),
    "Llama-4-Scout": Known("Llama 4"),
    "Qwen3-Next-80B": Known("Qwen3-Next", "H200"),
    "Qwen3.5-27B": Known(),
    "Nemotron-3-Nano": Known("Nemotron-H", TINY),
    "Granite-4.0-H-Small": Known("Granite 4", TINY),
    "LFM2-1.2B": Known("LFM2"),
    "Falcon-H1-7B": Known("Falcon-H1"),
    "Mistral-7B-v0.1": Known(refused="windows throughout"),
    "BLOOM-7B": Known(refused="ALiBi"),
    "DeepSeek-V3": Known(refused="MLA"),
    "T5": Known(refused="encoder-decoder"),
}
