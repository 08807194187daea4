"""Bytes that one running request really holds in the cache, tail included, against bf16.

    python benchmarks/held.py --lengths 1024 4096 32768 131072

Runs one request of each length on the shape of Llama-3.1-8B with few layers and dummy weights, reads vLLM's block pool
while it decodes and writes `held_bytes_a_layer` to benchmarks/results/engine.jsonl.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

from bench.record import record
from bench.shapes import LLAMA_3_1_8B, write_model, write_random_dictionary

NUM_DECODED = 8
CACHE_BYTES = 8 << 30


def pages_held(llm: Any, length: int) -> int:
    """Pages in use while a request decodes, a few tokens short of `length`, the null block aside."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    empty = pool.get_num_free_blocks()
    prompt = {"prompt_token_ids": [1 + i % 1000 for i in range(length - 2 * NUM_DECODED)]}
    engine.add_request("held", prompt, SamplingParams(max_tokens=2 * NUM_DECODED, ignore_eos=True, temperature=0))
    held = 0
    while engine.has_unfinished_requests():
        outputs = engine.step()
        if outputs and len(outputs[0].outputs[0].token_ids) == NUM_DECODED:
            held = empty - pool.get_num_free_blocks()
    return held


def main() -> None:
    """Measure each length at each sparsity."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 32768, 131072])
    parser.add_argument("--sparsities", type=int, nargs="+", default=[15, 7])
    parser.add_argument("--layers", type=int, default=2, help="of the model; the ratio does not depend on it")
    args = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the pool is read in this process
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / "llama-3.1-8b-shape", LLAMA_3_1_8B, args.layers)
        dictionary = write_random_dictionary(model, atoms=256)
        for sparsity in args.sparsities:
            llm = LLM(
                str(model),
                load_format="dummy",
                skip_tokenizer_init=True,
                enforce_eager=True,
                enable_prefix_caching=False,
                max_model_len=max(args.lengths),
                gpu_memory_utilization=0.2,
                kv_cache_memory_bytes=CACHE_BYTES,
                attention_backend="LEXICO",
                additional_config={"lexico": {"dictionary": str(dictionary), "sparsity": sparsity}},
            )
            context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
            cache = next(layer.kv_cache for layer in context.values())
            page_bytes = cache.stride(0) * cache.element_size()
            for length in args.lengths:
                held = pages_held(llm, length) * page_bytes
                dense = length * LLAMA_3_1_8B["num_key_value_heads"] * LLAMA_3_1_8B["head_dim"] * 2 * 2
                case = {"model": "Llama-3.1-8B shape", "sparsity": sparsity, "tokens": length}
                row = record("engine", case, "held_bytes_a_layer", held, "bf16", dense)
                print(f"sparsity {sparsity}, {length} tokens: {row['ratio']:.2%} of bf16", file=sys.stderr)
            del llm


if __name__ == "__main__":
    main()
