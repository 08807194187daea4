"""What engines answer, each in a process of its own: `in_a_process(answer_thrice, ...)`."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from faults import FAULTS
from written import written

ON_A_GPU = torch.version.cuda is not None  # of vLLM's build; asking for devices would spoil a fork
WITHIN, FAULT_APART = (0.02, 0.2) if ON_A_GPU else (1e-4, 1e-2)  # log-probabilities of what is the same, and is not
SETTINGS = {"max_model_len": 768, "enforce_eager": True, "dtype": "float32", "seed": 0, "skip_tokenizer_init": True}
COLD_TOKENS, WARM_TOKENS = 40, 16
FAULTY_TOKENS = 8  # of answers with a fault planted: it shows soon or never
TEXT_CHARACTERS = 1 << 17
SHORT = {"ANSWER_TOKENS": 8, "PREEMPTED_TOKENS": 24}  # what scenarios with a fault are asked for


def on_this_device() -> dict[str, Any]:
    """Settings of engines on a GPU, which read bfloat16 and share its memory with others; none on a CPU."""
    shared = {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.02}
    return shared | {"dtype": "bfloat16"} if ON_A_GPU else {}


def make_prompts() -> list[list[int]]:
    """Repetitive prompts, so that drafts from the prompt are found and now and then accepted; the last two share."""
    words = [make_tokens(i, 7) for i in range(4)]
    rows = [(words[i] * 60)[:length] for i, length in enumerate((5, 130, 300, 411))]
    return [*rows, rows[3][:300] + rows[1][:50]]


def make_irregular_prompts() -> list[list[int]]:
    """Prompts whose every part matters, so that a fault shows; the longest read codes whatever the window and pages."""
    return [make_tokens(10, 420), make_tokens(11, 740)]


def make_tokens(seed: int, count: int) -> list[int]:
    """Random tokens of a vocabulary of 100, none of them special."""
    draw = random.Random(seed)
    return [draw.randrange(3, 100) for _ in range(count)]


TEXT = make_tokens(23, 160)  # longer than windows and chunks


def start(model: str, backend: str, lexico: dict[str, Any], settings: dict[str, Any]) -> Any:
    """An engine in float32; one of LEXICO's can have faults planted."""
    import vllm

    settings = SETTINGS | settings
    if backend == "LEXICO":
        settings = {"additional_config": {"lexico": lexico}, "worker_extension_cls": "faults.Faults"} | settings
    return vllm.LLM(model, attention_backend=backend, **settings)


def ask(llm: Any, prompts: list[list[int]], count: int) -> tuple[list[list[int]], list[int]]:
    """The first tokens of greedy answers, and how many tokens of each prompt the cache had."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    said = [list(output.outputs[0].token_ids) for output in outputs]
    return said, [output.num_cached_tokens for output in outputs]


def hit_again(llm: Any, prompt: list[int]) -> int:
    """Tokens of a prompt that the cache has when it is asked a second time."""
    return [ask(llm, [prompt], 1)[1][0] for _ in range(2)][1]


def plant_each(llm: Any) -> Iterator[str]:
    """Faults, each planted while the caller has its name."""
    for fault in FAULTS:
        llm.collective_rpc("plant_fault", args=(fault,))
        yield fault
    llm.collective_rpc("plant_fault", args=(None,))


def answer_thrice(model: str, backend: str, lexico: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What an engine answers to all prompts.

    Returns:
        rounds: tokens three times over: cold, with prefix hits, and continued.
        sound: the first tokens of cold answers to the irregular prompts.
        faults: the same with each fault planted, by its name.
    """
    llm, prompts = start(model, backend, lexico, settings), make_prompts()
    rounds = [ask(llm, prompts, count)[0] for count in (COLD_TOKENS, WARM_TOKENS)]
    continued = [prompt + reply for prompt, reply in zip(prompts, rounds[0], strict=True)]
    rounds.append(ask(llm, continued, WARM_TOKENS)[0])
    irregular = make_irregular_prompts()
    sound, faults = ask(llm, irregular, FAULTY_TOKENS)[0], {}
    for fault in plant_each(llm) if backend == "LEXICO" else ():
        llm.reset_prefix_cache()
        faults[fault] = ask(llm, irregular, FAULTY_TOKENS)[0]
    return {"rounds": rounds, "sound": sound, "faults": faults}


def answer_again(model: str, lexico: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Answers cold and again.

    Returns:
        cold, again: tokens of answers.
        hits: tokens that the second round found in the prefix cache.
        faults: tokens of answers from the cache with each fault planted, by its name.
    """
    llm = start(model, "LEXICO", lexico, settings)
    prompts = [make_tokens(length, length) for length in (300, 411, 640)]
    cold, _ = ask(llm, prompts, WARM_TOKENS)
    again, hits = ask(llm, prompts, WARM_TOKENS)
    faults = {fault: ask(llm, prompts, WARM_TOKENS)[0] for fault in plant_each(llm)}
    return {"cold": cold, "again": again, "hits": hits, "faults": faults}


def answer_beside(
    model: str, backends: tuple[str, ...], lexico: dict[str, Any], settings: dict[str, Any], lengths: Sequence[int] = ()
) -> dict[str, dict[str, Any]]:
    """What engines answer to long prompts in chunks, and to their continuations from the prefix cache.

    lengths: of prompts that are asked twice.

    Returns by backend:
        tokens, logprobs: of the first tokens of each answer, cold and continued.
        hits: tokens of each prompt that the prefix cache had.
        again: the same of prompts of `lengths` when they are asked a second time.
        faulty: log-probabilities of cold answers with a fault planted; of LEXICO alone.
        written: K and V of `TEXT`, see `written`; of LEXICO alone.
        line, kept: LEXICO's line at start; see `_kept`.
    """
    import logging

    import vllm

    said_at_start: list[str] = []
    # Not a handler: vLLM's engines take those away.
    logging.getLogger("vllm.lexico").info = lambda form, *given: said_at_start.append(form % given if given else form)

    asked = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=0)

    def answers(llm: Any, prompts: list[list[int]]) -> list[Any]:
        return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)

    def logprobs(output: Any) -> list[float]:
        said = output.outputs[0]
        return [one[token].logprob for token, one in zip(said.token_ids, said.logprobs, strict=True)]

    found = {}
    for backend in backends:
        llm, prompts = start(model, backend, lexico, settings), [make_tokens(20, 600), make_tokens(21, 333)]
        cold = answers(llm, prompts)
        said = [list(output.outputs[0].token_ids) for output in cold]
        more = [prompt + reply + make_tokens(22, 20) for prompt, reply in zip(prompts, said, strict=True)]
        outputs = cold + answers(llm, more)
        found[backend] = {
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "logprobs": [logprobs(output) for output in outputs],
            "hits": [output.num_cached_tokens for output in outputs],
            "again": [hit_again(llm, make_tokens(100 + length, length)) for length in lengths],
        }
        if backend == "LEXICO":
            (found[backend]["line"],) = [line for line in said_at_start if line.startswith("LEXICO:")]
            found[backend]["kept"] = _kept(llm)
            with written() as found[backend]["written"]:
                ask(llm, [TEXT], 1)
            llm.reset_prefix_cache()
            llm.collective_rpc("plant_fault", args=(next(iter(FAULTS)),))
            found[backend]["faulty"] = [logprobs(output) for output in answers(llm, prompts)]
        del llm
    return found


def _kept(llm: Any) -> tuple[int, int]:
    """Layers with windows, chunks or states, and what a request keeps there, by the groups as vLLM made them."""
    config = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    bounded = ("SlidingWindowSpec", "ChunkedLocalAttentionSpec", "MambaSpec")
    groups = [group for group in config.kv_cache_groups if type(group.kv_cache_spec).__name__ in bounded]
    counts = [len(group.layer_names) for group in groups]
    kept = [group.kv_cache_spec.max_memory_usage_bytes(llm.llm_engine.vllm_config) for group in groups]
    return sum(counts), sum(count * one for count, one in zip(counts, kept, strict=True))


def refusal_or_answer(cache: str, model: str, settings: dict[str, Any]) -> tuple[str, list[str]]:
    """The sentence with which an engine with codes does not start, or ""; then what it logs at its start.

    cache: the user's, for dictionaries.
    """
    import logging
    import os

    os.environ["XDG_CACHE_HOME"] = cache
    said: list[str] = []
    # Not a handler: vLLM's engines take those away.
    logging.getLogger("vllm.lexico").info = lambda form, *given: said.append(form % given if given else form)
    try:
        llm = start(model, "LEXICO", {"sparsity": 7}, settings)
    except ValueError as error:
        return str(error), said
    ((answer,), _) = ask(llm, [make_tokens(3, 300)], 8)
    assert len(answer) == 8
    return "", said


def score_a_prompt(
    model: str, backend: str, lexico: dict[str, Any], more: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Log-probabilities of a prompt's tokens in bfloat16, and how the cache is kept. more: settings of vLLM's.

    Returns:
        scores: of the tokens but the first.
        specs, dtype: of the cache's groups, and as the user would name it.
        faults: scores with each fault planted, by its name.
    """
    import vllm

    settings = {"dtype": "bfloat16", "max_model_len": 512, "max_num_batched_tokens": 64}
    llm = start(model, backend, lexico, settings | (more or {}))
    prompt = make_tokens(0, 500)
    asked = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)

    def scores() -> list[float]:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
        return [one[token].logprob for token, one in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]

    sound = scores()
    faults = {fault: scores() for fault in plant_each(llm)} if backend == "LEXICO" else {}
    groups = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    specs = [type(group.kv_cache_spec).__name__ for group in groups]
    dtype = llm.llm_engine.vllm_config.cache_config.cache_dtype
    return {"scores": sound, "specs": specs, "dtype": dtype, "faults": faults}


def run_scenarios(
    benchmarks: str, name: str, model: str, backend: str, lexico: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Run the scenarios of one engine of exactness.py, in LEXICO again with each fault planted, in short.

    Returns:
        Answers and counts by the scenario's name, under "whole" and under each fault's name.
    """
    import sys

    sys.path.insert(0, benchmarks)
    import exactness

    settings = {"enforce_eager": True, "dtype": "float32"}
    if backend == "LEXICO":
        settings["worker_extension_cls"] = "faults.Faults"
    engine, scenarios = exactness.start(name, model, backend, lexico, settings, characters=TEXT_CHARACTERS)
    found = {"whole": _run(engine, scenarios)}
    if backend == "LEXICO":
        for setting, value in SHORT.items():
            setattr(exactness, setting, value)
        for fault in plant_each(engine.llm):
            found[fault] = _run(engine, scenarios)
    return found


def _run(engine: Any, scenarios: list) -> dict[str, Any]:
    found = {}
    for scenario in scenarios:
        engine.llm.reset_prefix_cache()
        said, counts = scenario(engine, 1)
        found[scenario.__name__] = {"answers": said, "counts": counts}
    return found


def read_beside_decode(model: str, lexico: dict[str, Any], settings: dict[str, Any]) -> tuple[int, int]:
    """Tokens of an answer when a prompt that came while it was written has been read, and a block's tokens."""
    from vllm import SamplingParams

    llm = start(model, "LEXICO", lexico, settings)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    engine, tokens = llm.llm_engine, {"answer": 0, "prompt": 0}
    engine.add_request("answer", {"prompt_token_ids": make_tokens(0, 8)}, params)
    while not tokens["prompt"]:
        for output in engine.step():
            tokens[output.request_id] = len(output.outputs[0].token_ids)
        if tokens["answer"] == 3:
            engine.add_request("prompt", {"prompt_token_ids": make_tokens(1, 600)}, params)
    return tokens["answer"], engine.vllm_config.cache_config.mamba_block_size
