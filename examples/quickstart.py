"""Ask a real model two questions through LEXICO and say what its KV cache costs.

    python examples/quickstart.py [--model PATH_OR_ID] [--prompt TEXT] [--sparsity S]

Runs on a GPU if there is one, else on the CPU. Without --model it takes SmolLM2-135M-Instruct (see get_model.py), which
needs 270 MB on disk. The second question is about a text of some 550 tokens, most of which the model can only read
from the codes by the time it answers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Without it the model nearly ties between English and French on the first question, and bfloat16's rounding decides.
SYSTEM = "Answer truthfully in one short sentence."
FOLDER = Path(__file__).parent
QUESTION = "What is the capital of France?"
LONG_QUESTION = "Who built the lighthouse on Gull Island?"
BACKEND = "LEXICO"
MAX_MODEL_LEN = 2048


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Ask a model two questions through LEXICO; print answers and memory.")
    parser.add_argument("--model", help="a checkpoint's folder or hub id (default: fetch SmolLM2-135M-Instruct)")
    parser.add_argument("--prompt", default=QUESTION, help="the first question (default: %(default)s)")
    parser.add_argument("--sparsity", type=int, help="atoms a vector: fewer save more memory (default: LEXICO's own)")
    parser.add_argument("--max-tokens", type=int, default=48, help="longest answer (default: %(default)s)")
    parser.add_argument(
        "--attention-backend",
        default=BACKEND,
        help="another name, or auto, shows vLLM without LEXICO",
    )
    return parser.parse_args()


def fetch_model() -> str:
    """Path of SmolLM2-135M-Instruct; fetched in a process of its own, which is also how the tests get it."""
    command = [sys.executable, str(FOLDER / "get_model.py")]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if result.returncode:
        sys.exit(result.returncode)  # it has said why
    return result.stdout.strip()


def start_engine(args: argparse.Namespace) -> Any:
    """Start vLLM on the model of `args`, with settings small enough for a laptop's CPU."""
    import torch

    settings: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "attention_backend": args.attention_backend}
    if args.attention_backend == BACKEND and args.sparsity is not None:
        settings["additional_config"] = {"lexico": {"sparsity": args.sparsity}}
    if torch.cuda.is_available():
        settings["gpu_memory_utilization"] = 0.5
    else:
        settings["enforce_eager"] = True  # compiling takes longer than the two answers
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

    from vllm import LLM

    return LLM(args.model, **settings)


def ask(llm: Any, question: str, max_tokens: int) -> str:
    """Greedy answer to one chat message."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    [output] = llm.chat(messages, params, use_tqdm=False)
    return output.outputs[0].text.strip()


def print_memory(llm: Any) -> None:
    """Print what a token costs in bfloat16 and in LEXICO's codes, and how many tokens the started engine can hold."""
    from lexico_kernels import CodeLayout

    from vllm_lexico.config import LexicoConfig

    config = llm.llm_engine.vllm_config
    model, settings = config.model_config, LexicoConfig.from_additional_config(config.additional_config)
    layers, kv_heads = model.get_num_layers(config.parallel_config), model.get_total_num_kv_heads()
    layout = CodeLayout(
        head_dim=model.get_head_size(),
        num_kv_heads=kv_heads,
        key_sparsity=settings.sparsity.key,
        value_sparsity=settings.sparsity.value,
        codec=settings.codec,
        element_bytes=model.dtype.itemsize,
    )
    plain, coded = (layers * kv_heads * size for size in (layout.raw_token_bytes, layout.cell_bytes))
    print(f"\nKV cache of {layers} layers, {kv_heads} KV heads of size {layout.head_dim}, bytes per token")
    print(f"  {str(model.dtype).removeprefix('torch.'):10}{plain:>10,}")
    print(f"  {BACKEND:10}{coded:>10,}   {layout.ratio:.1%}, {plain - coded:,} bytes saved with every token")
    sinks = -(-settings.sinks // layout.tail_tokens) * layout.tail_tokens
    print(f"  The newest {settings.window} tokens or so and the first {sinks} are also kept uncoded.")
    if tokens := config.cache_config.kv_cache_size_tokens:
        print(f"  This engine's cache holds {tokens:,} tokens in requests of {MAX_MODEL_LEN:,}.")


def main() -> None:
    """Start, ask, report."""
    args = parse_args()
    started = time.perf_counter()
    args.model = args.model or fetch_model()
    print(f"Starting vLLM with {args.model} on {args.attention_backend} (about half a minute) ...", flush=True)
    llm = start_engine(args)
    text = (FOLDER / "lighthouse.txt").read_text(encoding="utf-8")
    for shown, question in ((args.prompt, args.prompt), (f"[a text] {LONG_QUESTION}", f"{text}\n{LONG_QUESTION}")):
        print(f"\nQ: {shown}\nA: {ask(llm, question, args.max_tokens)}", flush=True)
    if args.attention_backend == BACKEND:
        print_memory(llm)
    print(f"\nAll of it took {time.perf_counter() - started:.0f} s.")


if __name__ == "__main__":
    main()
