"""Start engines one after another and write what each answers: `python run_engines.py CASES.json ANSWERS.json`.

A process of its own, because vLLM on a CPU cannot start another engine in a process once drafts were used there.
"""

import gc
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

PROMPT_TOKENS = (5, 130, 300, 411)
ANSWER_TOKENS = 40


def make_prompts() -> list[list[int]]:
    """Repetitive prompts, so that drafts from the prompt are found and now and then accepted; the last two share."""
    words = [[random.Random(i).randrange(3, 512) for _ in range(7)] for i in range(4)]
    rows = [(words[i] * 60)[:length] for i, length in enumerate(PROMPT_TOKENS)]
    return [*rows, rows[3][:300] + rows[1][:50]]


def answer(model: str, backend: str, lexico: dict[str, Any], settings: dict[str, Any]) -> list[list[list[int]]]:
    """Tokens of an engine's answers to all prompts, three times over: cold, with prefix hits, and continued."""
    import vllm

    settings = {"max_model_len": 768, "enforce_eager": True, "dtype": "float32", "seed": 0} | settings
    if backend == "LEXICO":
        settings["additional_config"] = {"lexico": lexico}
    llm = vllm.LLM(model, load_format="dummy", skip_tokenizer_init=True, attention_backend=backend, **settings)
    params = vllm.SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True, detokenize=False)
    given, tokens = make_prompts(), []
    for _ in range(3):
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in given], params, use_tqdm=False)
        tokens.append([list(output.outputs[0].token_ids) for output in outputs])
        if len(tokens) == 2:
            given = [prompt + reply for prompt, reply in zip(given, tokens[-1], strict=True)]
    del llm
    gc.collect()
    vllm.distributed.cleanup_dist_env_and_memory()
    return tokens


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(**case) for case in cases]))
