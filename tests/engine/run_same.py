"""Ask engines the same prompts cold and again from the prefix cache: `python run_same.py CASES.json ANSWERS.json`."""

import gc
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

PROMPT_TOKENS = (300, 411, 640)
ANSWER_TOKENS = 16


def answers(model: str, lexico: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Tokens of both rounds, and how many tokens the second found in the cache."""
    import vllm

    settings = {"max_model_len": 768, "enforce_eager": True, "dtype": "float32", "seed": 0} | settings
    llm = vllm.LLM(
        model,
        skip_tokenizer_init=True,
        attention_backend="LEXICO",
        additional_config={"lexico": lexico},
        **settings,
    )
    params = vllm.SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False)
    rows = [[random.Random(length).randrange(3, 100) for _ in range(length)] for length in PROMPT_TOKENS]
    prompts = [{"prompt_token_ids": row} for row in rows]
    rounds = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
    said = [[list(output.outputs[0].token_ids) for output in outputs] for outputs in rounds]
    hits = [output.num_cached_tokens for output in rounds[1]]
    del llm
    gc.collect()
    vllm.distributed.cleanup_dist_env_and_memory()
    return {"cold": said[0], "again": said[1], "hits": hits}


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answers(**case) for case in cases]))
