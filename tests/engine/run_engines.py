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

from faults import FAULTS

PROMPT_TOKENS = (5, 130, 300, 411)
ANSWER_TOKENS = 40
FAULTY_TOKENS = 16  # of answers with a fault planted: it shows soon or never


def make_prompts() -> list[list[int]]:
    """Repetitive prompts, so that drafts from the prompt are found and now and then accepted; the last two share."""
    words = [[random.Random(i).randrange(3, 100) for _ in range(7)] for i in range(4)]
    rows = [(words[i] * 60)[:length] for i, length in enumerate(PROMPT_TOKENS)]
    return [*rows, rows[3][:300] + rows[1][:50]]


def make_irregular_prompts() -> list[list[int]]:
    """Prompts whose every part matters, so that a fault shows; the longest read codes whatever the window and pages."""
    return [[random.Random(10 + i).randrange(3, 100) for _ in range(length)] for i, length in enumerate((420, 740))]


def ask(llm: Any, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The first tokens of greedy answers."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def answer(model: str, backend: str, lexico: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What an engine answers to all prompts.

    Returns:
        rounds: tokens three times over: cold, with prefix hits, and continued.
        sound: the first tokens of cold answers to the irregular prompts.
        faults: the same with each fault planted, by its name.
    """
    import vllm

    settings = {"max_model_len": 768, "enforce_eager": True, "dtype": "float32", "seed": 0} | settings
    if backend == "LEXICO":
        settings |= {"additional_config": {"lexico": lexico}, "worker_extension_cls": "faults.Faults"}
    llm = vllm.LLM(model, skip_tokenizer_init=True, attention_backend=backend, **settings)
    prompts = make_prompts()
    rounds = [ask(llm, prompts, ANSWER_TOKENS) for _ in range(2)]
    rounds.append(ask(llm, [prompt + reply for prompt, reply in zip(prompts, rounds[1], strict=True)], ANSWER_TOKENS))
    irregular, faults = make_irregular_prompts(), {}
    sound = ask(llm, irregular, FAULTY_TOKENS)
    for fault in FAULTS if backend == "LEXICO" else ():
        llm.reset_prefix_cache()
        llm.collective_rpc("plant_fault", args=(fault,))
        faults[fault] = ask(llm, irregular, FAULTY_TOKENS)
    if faults:
        llm.collective_rpc("plant_fault", args=(None,))
    del llm
    gc.collect()
    vllm.distributed.cleanup_dist_env_and_memory()
    return {"rounds": rounds, "sound": sound, "faults": faults}


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    cases = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([answer(**case) for case in cases]))
