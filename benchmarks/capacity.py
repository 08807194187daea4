"""Tokens that fit in the same memory, as vLLM's start-up line counts them, LEXICO against another backend.

    python benchmarks/capacity.py                 # the shape of Llama-3.1-8B, dummy weights, one GPU

Writes `kv_cache_tokens` of each sparsity to benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.record import record
from bench.shapes import LLAMA_3_1_8B, write_model, write_random_dictionary
from lexico_kernels import CodeLayout

HEADS, HEAD_DIM = LLAMA_3_1_8B["num_key_value_heads"], LLAMA_3_1_8B["head_dim"]
ANSWER = "kv_cache_tokens="


def measure(model: Path, settings: dict[str, Any]) -> int:
    """Start an engine in a process of its own and return the tokens that its start-up line names."""
    command = [sys.executable, __file__, "--engine", json.dumps(settings), "--model", str(model)]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the count is read in the engine's process
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if result.returncode:
        sys.exit(f"capacity: the engine with {settings} did not start; its messages are above")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(ANSWER)]
    return int(line.removeprefix(ANSWER))


def start(model: Path, settings: dict[str, Any]) -> None:
    """Start the engine in this process and print its tokens."""
    from vllm import LLM

    llm = LLM(str(model), load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, **settings)
    print(f"{ANSWER}{llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens}", flush=True)


def main() -> None:
    """Measure the peer, then each sparsity."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--max-model-len", type=int, default=32768)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--peer", default="FLASH_ATTN", help="attention backend to compare with (default: %(default)s)")
    parser.add_argument("--sparsities", type=int, nargs="+", default=[15, 7])
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try this out")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--engine", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.engine:
        return start(args.model, args.engine)
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "llama-3.1-8b-shape", LLAMA_3_1_8B, args.layers)
        dictionary = write_random_dictionary(model)
        common = {"max_model_len": args.max_model_len, "gpu_memory_utilization": args.gpu_memory_utilization}
        peer_tokens = measure(model, common | {"attention_backend": args.peer})
        print(f"{args.peer}: {peer_tokens:,} tokens", file=sys.stderr)
        for sparsity in args.sparsities:
            lexico = {"dictionary": str(dictionary), "sparsity": sparsity}
            settings = {"attention_backend": "LEXICO", "additional_config": {"lexico": lexico}}
            tokens = measure(model, common | settings)
            layout = CodeLayout(HEAD_DIM, HEADS, sparsity, sparsity)
            case = {"model": "Llama-3.1-8B shape", "bytes_percent": 100 * layout.ratio, **common}
            row = record("engine", case, "kv_cache_tokens", tokens, args.peer, peer_tokens)
            print(f"sparsity {sparsity}: {tokens:,} tokens, {row['ratio']:.2f} times", file=sys.stderr)
    return None


if __name__ == "__main__":
    main()
