"""Tiny checkpoints that draft for `strong_llama` and for a MiMo, and what engines with them answer."""

import json
from pathlib import Path
from typing import Any

from engines import make_tokens, start
from faults import REJECTED_KEPT

ANSWER_TOKENS, CONTINUED_TOKENS, NUM_DRAFTS = 40, 12, 3
FAULTY_PROMPTS, FAULTY_TOKENS = 2, 200  # enough for codes of answers to be read
LENGTHS = (100, 333, 640, 1010)
COUNTS = ("vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens")
MIMO = {
    "architectures": ["MiMoForCausalLM"],
    "model_type": "mimo",
    "vocab_size": 100,
    "hidden_size": 256,  # as many as heads of head_dim have, which vLLM's Qwen2 does not read
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "attention_bias": True,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "use_sliding_window": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}


def write_weights(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], spread: float) -> Path:
    """Write a checkpoint of random tensors; norms are ones."""
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(1)
    weights = {
        name: torch.ones(shape) if "norm" in name else torch.randn(shape, generator=draw) * spread
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def layer_shapes(prefix: str, config: dict[str, Any], inputs: int = 1) -> dict[str, tuple[int, ...]]:
    """Tensors of one layer of Llama or Qwen2; `inputs` times as wide where attention reads them."""
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, heads = config["num_attention_heads"] * size, config["num_key_value_heads"] * size
    widths = {"q": queries, "k": heads, "v": heads}
    shapes = {f"self_attn.{name}_proj.weight": (width, inputs * hidden) for name, width in widths.items()}
    if config.get("attention_bias"):
        shapes |= {f"self_attn.{name}_proj.bias": (width,) for name, width in widths.items()}
    shapes |= {f"mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
    shapes |= {"self_attn.o_proj.weight": (hidden, queries), "mlp.down_proj.weight": (hidden, inner)}
    shapes |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return {prefix + name: shape for name, shape in shapes.items()}


def head_config(model: Path) -> dict[str, Any]:
    """Of a head of EAGLE for a Llama, with a KV head more than the model and smaller heads."""
    own = json.loads((model / "config.json").read_text())
    config = {key: own[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings")}
    config |= {"head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 3, "num_hidden_layers": 1}
    return config | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
    }


def write_eagle(model: Path, folder: Path) -> Path:
    """A random head of EAGLE, the first of its kind: one layer that reads the last hidden state and a token."""
    config = head_config(model)
    shapes = layer_shapes("layers.0.", config) | {"fc.weight": (config["hidden_size"], 2 * config["hidden_size"])}
    del shapes["layers.0.input_layernorm.weight"]
    return write_weights(folder, config, shapes, 0.1)


def write_eagle3(model: Path, folder: Path) -> Path:
    """A random head of EAGLE3 for a Llama, with a vocabulary of its own."""
    config = head_config(model) | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 100}
    config["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    hidden = config["hidden_size"]
    shapes = layer_shapes("midlayer.", config, inputs=2)
    shapes |= {"midlayer.hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    shapes |= {"fc.weight": (hidden, 3 * hidden), "lm_head.weight": (config["draft_vocab_size"], hidden)}
    return write_weights(folder, config, shapes, 0.1)


def write_dflash(model: Path, folder: Path) -> Path:
    """A random DFlash for a Llama, whose two layers see a block of drafts in both directions."""
    config = head_config(model) | {"architectures": ["DFlashDraftModel"], "model_type": "qwen3"}
    config |= {"num_hidden_layers": 2, "block_size": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    config["dflash_config"] = {"mask_token_id": 2, "target_layer_ids": [0, 1, 2]}
    hidden = config["hidden_size"]
    shapes = {"fc.weight": (hidden, 3 * hidden), "hidden_norm.weight": (hidden,), "norm.weight": (hidden,)}
    for index in range(config["num_hidden_layers"]):
        prefix = f"layers.{index}."
        shapes |= layer_shapes(prefix, config)
        shapes |= {f"{prefix}self_attn.{name}_norm.weight": (config["head_dim"],) for name in "qk"}
    return write_weights(folder, config, shapes, 0.1)


def write_mimo(folder: Path) -> Path:
    """A random MiMo with one layer that predicts a token more."""
    hidden, vocabulary = MIMO["hidden_size"], MIMO["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (hidden,)}
    shapes |= {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    for index in range(MIMO["num_hidden_layers"]):
        shapes |= layer_shapes(f"model.layers.{index}.", MIMO)
    extra = "model.mtp_layers.0."
    shapes |= layer_shapes(extra, MIMO)
    shapes |= {f"{extra}{name}_layernorm.weight": (hidden,) for name in ("token", "hidden", "final")}
    shapes[f"{extra}input_proj.weight"] = (hidden, 2 * hidden)
    return write_weights(folder, MIMO, shapes, 0.12)


def write_qwen3_next(folder: Path) -> Path:
    """A random Qwen3-Next with linear attention in every second layer, and a layer that predicts a token more."""
    import torch
    from safetensors.torch import load_file, save_file
    from tiny_families import FAMILIES, write_checkpoint

    file = write_checkpoint(FAMILIES["Qwen3-Next"], folder) / "model.safetensors"
    weights, config = load_file(file), json.loads((folder / "config.json").read_text())
    copied = "model.layers.1."  # an attention layer
    extra = {f"mtp.layers.0.{name[len(copied) :]}": one for name, one in weights.items() if name.startswith(copied)}
    hidden, head = config["hidden_size"], weights["lm_head.weight"]
    draw = torch.Generator().manual_seed(1)
    extra["mtp.fc.weight"] = (torch.randn(hidden, 2 * hidden, generator=draw) * 0.12).to(head.dtype)
    norms = ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
    extra |= {f"mtp.{name}.weight": torch.zeros(hidden, dtype=head.dtype) for name in norms}
    save_file(weights | {name: one.clone() for name, one in extra.items()}, file, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}), encoding="utf-8")
    return folder


def write_draft_model(model: Path, folder: Path, noise: float) -> Path:
    """A copy of a model with noise on its weights: some of its drafts are accepted and some are not."""
    import torch
    from safetensors.torch import load_file, save_file

    draw = torch.Generator().manual_seed(2)
    weights = load_file(model / "model.safetensors")
    noisy = {name: one + noise * one.std() * torch.randn(one.shape, generator=draw) for name, one in weights.items()}
    save_file(
        {name: noisy[name] if one.dim() > 1 else one for name, one in weights.items()}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text((model / "config.json").read_text(), encoding="utf-8")
    return folder


def write_own_draft_model(folder: Path) -> Path:
    """A random Llama of another shape than the model that it drafts for: two layers of heads of 32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        initializer_range=0.12,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_prompts() -> list[list[int]]:
    """Prompts of 100 to some 1,000 tokens."""
    return [make_tokens(30 + length, length) for length in LENGTHS]


def answer_with_drafts(
    model: str, backend: str, lexico: dict[str, Any], settings: dict[str, Any], fault: str | None
) -> dict[str, Any]:
    """What an engine that drafts answers to long prompts in chunks, and to their continuations from the cache.

    Returns:
        tokens, logprobs: of each answer, cold and continued.
        hits: tokens of each prompt that the prefix cache had.
        counts: tokens drafted and accepted.
        groups: names of the layers of each cache group.
        long, faulty: the same, of longer answers to the first prompts, or shorter ones to the last, sound and with the
            fault; where there is one.
    """
    import transformers
    import vllm

    if "mimo" not in transformers.models.auto.configuration_auto.CONFIG_MAPPING:  # its checkpoints bring the class
        kind = type("MiMoConfig", (transformers.Qwen2Config,), {"model_type": "mimo"})
        transformers.AutoConfig.register("mimo", kind)
    llm, prompts = start(model, backend, lexico, {"disable_log_stats": False} | settings), make_prompts()

    def answers(prompts: list[list[int]], count: int) -> list[Any]:
        asked = vllm.SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=0)
        return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)

    cold = answers(prompts, ANSWER_TOKENS)
    said = [list(output.outputs[0].token_ids) for output in cold]
    outputs = cold + answers(
        [prompt + reply + make_tokens(22, 20) for prompt, reply in zip(prompts, said, strict=True)], CONTINUED_TOKENS
    )
    metrics = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in COUNTS}
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [logprobs(output) for output in outputs],
        "hits": [output.num_cached_tokens for output in outputs],
        "counts": [int(metrics[name]) for name in COUNTS],
        "groups": [list(group.layer_names) for group in groups],
    }
    for name, planted in (("long", None), ("faulty", fault)) if fault else ():
        llm.reset_prefix_cache()
        if backend == "LEXICO":
            llm.collective_rpc("plant_fault", args=(planted,))
        if fault == REJECTED_KEPT:
            outputs = answers(prompts[:FAULTY_PROMPTS], FAULTY_TOKENS)
        else:
            outputs = answers(prompts[-FAULTY_PROMPTS:], CONTINUED_TOKENS)
        found[name] = {"tokens": [list(output.outputs[0].token_ids) for output in outputs]}
        found[name]["logprobs"] = [logprobs(output) for output in outputs]
    return found


def logprobs(output: Any) -> list[float]:
    """Log-probabilities of an answer's own tokens."""
    said = output.outputs[0]
    return [one[token].logprob for token, one in zip(said.token_ids, said.logprobs, strict=True)]
