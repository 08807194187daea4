"""Families of models crossed with settings: what an engine answers, and how far LEXICO's exact codec is from vLLM's.

Whatever the other layers of a model are and whatever is set, with the exact codec an engine answers as vLLM does
without LEXICO: in float32 to a small number, in bfloat16 within what bfloat16 itself does, by which vLLM's answers are
away from those in float16.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

from exactness import Answers, compare

ANSWER_TOKENS, SQUEEZED_TOKENS, FAULTY_TOKENS = 12, 26, 4
ALTERNATIVES = 8  # best tokens kept of each position
COMMON = {"max_model_len": 1024, "max_num_batched_tokens": 256, "max_num_seqs": 16, "enable_prefix_caching": True}
COMMON |= {"enforce_eager": True, "seed": 0, "skip_tokenizer_init": True}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SMALL_CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 4}
MOST_APART = {"float32": 1e-4, "bfloat16": 0.15}  # log-probabilities; bfloat16 where there is nothing to compare with
# The mean distance in bfloat16, of that from float16; how far from a tie two tokens may be where answers part, in nats.
ALLOWED_RATIO, TIE_NATS = 1.25, 0.5


class Setting(NamedTuple):
    """What is set.

    Attributes:
        lexico: in LEXICO's own settings.
        engine: in vLLM's.
        squeezed: the pool's free pages are taken away while requests are answered, so that some are preempted.
        changes_model: the engine without LEXICO is given the same, because another model answers.
    """

    lexico: dict[str, Any] = {}  # noqa: RUF012
    engine: dict[str, Any] = {}  # noqa: RUF012
    squeezed: bool = False
    changes_model: bool = False


SETTINGS = {
    "defaults": Setting(),
    "no window, no sinks": Setting({"window": 0, "sinks": 0}),
    "wide window, many sinks": Setting({"window": 200, "sinks": 100}),
    "window hits": Setting({"prefix_hits": "window"}),
    "same hits": Setting({"prefix_hits": "same"}),
    "small steps coded later": Setting({"coded_later": 50, "window": 0}, {"speculative_config": DRAFTS} | SMALL_CHUNKS),
    "blocks of 64": Setting({}, {"block_size": 64}),
    "blocks of 256": Setting({}, {"block_size": 256}),
    "blocks of 1,024": Setting({}, {"block_size": 1024}),
    "small chunks": Setting({"window": 0}, SMALL_CHUNKS),
    "whole prompts": Setting({}, {"enable_chunked_prefill": False, "max_num_batched_tokens": 1024}),
    "a share of a step per prompt": Setting({}, {"long_prefill_token_threshold": 48}),
    "one request at a time": Setting({}, {"max_num_seqs": 1}),
    "no prefix caching": Setting({}, {"enable_prefix_caching": False}),
    "hits of 16 tokens": Setting({}, {"prefix_match_unit": 16}),
    "windows kept": Setting({}, {"prefix_cache_retention_interval": 128}),
    "async scheduling": Setting({}, {"async_scheduling": True}),
    "no async scheduling": Setting({}, {"async_scheduling": False}),
    "priorities": Setting({}, {"scheduling_policy": "priority"}),
    "few pages": Setting({"window": 0}, squeezed=True),
    "few pages, small chunks, window hits": Setting({"prefix_hits": "window"}, SMALL_CHUNKS, squeezed=True),
    "drafts": Setting({}, {"speculative_config": DRAFTS}),
    "drafts in small chunks, few pages": Setting(
        {"window": 0, "sinks": 0}, {"speculative_config": DRAFTS} | SMALL_CHUNKS, squeezed=True
    ),
    "same hits, drafts, few pages": Setting(
        {"prefix_hits": "same", "sinks": 100}, {"speculative_config": DRAFTS}, squeezed=True
    ),
}
WINDOWED = {  # of models with windows of 100 tokens
    "longest below the window": Setting({}, {"max_model_len": 96}, changes_model=True),
    "longest is the window": Setting({}, {"max_model_len": 100}, changes_model=True),
    "longest above the window": Setting({}, {"max_model_len": 101}, changes_model=True),
    "windows off": Setting({}, {"disable_sliding_window": True, "max_model_len": 100}, changes_model=True),
    "windows never bind": Setting({}, {"hf_overrides": {"sliding_window": 2048}}, changes_model=True),
    "windows of 64": Setting({}, {"hf_overrides": {"sliding_window": 64}}, changes_model=True),
    "windows taken out": Setting({}, {"hf_overrides": {"sliding_window": None}}, changes_model=True),
}
STATEFUL = {
    "a state per block": Setting({}, {"mamba_cache_mode": "align"}),
    "states of steps": Setting({}, {"mamba_cache_mode": "all"}),
    "states of 32 bits": Setting({}, {"mamba_ssm_cache_dtype": "float32"}, changes_model=True),
    "a block for states": Setting({}, {"mamba_block_size": 256}),
}


PLAIN, OTHER, PIECES, SQUEEZED = "vLLM", "vLLM in float16", "vLLM in small chunks", "vLLM with few pages"
PEERS = {PLAIN: Setting(), OTHER: Setting({}, {"dtype": "float16"}), SQUEEZED: Setting(squeezed=True)}
PEERS |= {PIECES: Setting({}, SMALL_CHUNKS)}  # by which float32 is told from itself


def keeps_states(changes: dict[str, Any]) -> bool:
    """Whether a family has layers with linear attention, Mamba or convolutions."""
    return any(name.startswith(("linear", "mamba", "conv")) for name in changes)


def has_own_peer(changes: dict[str, Any], setting: Setting) -> bool:
    """Whether vLLM without LEXICO is given the same: another model answers, or a state is made in other pieces.

    vLLM's build for CPUs normalizes LFM2's keys otherwise where a prompt comes in other pieces.
    """
    return setting.changes_model or (keeps_states(changes) and "max_num_batched_tokens" in setting.engine)


def settings_of(changes: dict[str, Any], on_cpu: bool) -> dict[str, Setting]:
    """Settings that mean something for a family, by name.

    Args:
        changes: see tests/engine/tiny_families.py.
        on_cpu: with vLLM's build for CPUs, which has no kernel for drafts beside states.
    """
    stateful = keeps_states(changes)
    found = SETTINGS | (WINDOWED if changes.get("sliding_window") else {}) | (STATEFUL if stateful else {})
    without = {"speculative_config"} if on_cpu and stateful else set()
    return {name: setting for name, setting in found.items() if not without & set(setting.engine)}


def reads_codes(setting: Setting) -> bool:
    """Whether a prompt of 620 tokens reads so much from code pages that empty ones are seen."""
    short = setting.engine.get("max_model_len", COMMON["max_model_len"]) < COMMON["max_model_len"]
    wide = setting.lexico.get("window", 0) >= 200 or setting.engine.get("block_size", 0) >= 256
    return not (short or wide)


def make_tokens(seed: int, count: int) -> list[int]:
    """Random tokens of a vocabulary of 100, none of them special."""
    draw = random.Random(seed)
    return [draw.randrange(3, 100) for _ in range(count)]


def answer(
    model: str, setting: Setting, backend: str | None, settings: dict[str, Any], faults: str = ""
) -> dict[str, Any]:
    """What an engine of this process answers: cold prompts, then their continuations.

    Args:
        model: a checkpoint's folder.
        setting: one of SETTINGS.
        backend: "LEXICO", with the exact codec; another of vLLM's; or None for vLLM's choice.
        settings: more of vLLM's, which come before the setting's.
        faults: folder of a module `faults`: cold answers once more, with code pages that are empty.

    Returns:
        answers: tokens, and the best of each position with their log-probabilities.
        hits: tokens of each prompt that the prefix cache had.
        preemptions: how many.
        faulty: the first tokens of the first prompt's answer with the fault planted.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM

    settings = COMMON | settings | setting.engine
    if backend == "LEXICO":
        settings["additional_config"] = {"lexico": {"codec": "exact"} | setting.lexico}
    llm = LLM(model, attention_backend=backend, **settings)
    room = settings["max_model_len"] - 2 * SQUEEZED_TOKENS - 6
    if room > 400:
        prompts = [make_tokens(40, 620), make_tokens(41, 300), (make_tokens(50, 7) * 80)[:509]]  # soon another page
    else:  # of models with a short context
        prompts = [make_tokens(40, 40), (make_tokens(50, 7) * 9)[:50]]
        setting = setting._replace(squeezed=False)
    count = SQUEEZED_TOKENS if setting.squeezed else ANSWER_TOKENS
    cold = ask(llm, prompts, count, setting.squeezed)
    said = [row["tokens"] for row in cold["answers"]]
    more = [prompt + reply + make_tokens(42, 6) for prompt, reply in zip(prompts, said, strict=True)]
    again = ask(llm, more if room > 400 else prompts, count, setting.squeezed)
    found = {name: cold[name] + again[name] for name in cold}
    if faults:
        sys.path.insert(0, faults)
        plant = importlib.import_module("faults").plant
        plant("wiped pages")
        llm.reset_prefix_cache()
        found["faulty"] = ask(llm, prompts[:1], FAULTY_TOKENS, False)["answers"]
        plant(None)
    return found


def ask(llm: Any, prompts: list[list[int]], count: int, squeezed: bool) -> dict[str, Any]:
    """Greedy answers of so many tokens; see `answer`."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    asked = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False, logprobs=ALTERNATIVES)
    scheduler = engine.engine_core.engine_core.scheduler
    pool, preempt = scheduler.kv_cache_manager.block_pool, scheduler._preempt_request
    preemptions, done, taken = [], dict[int, Any](), None

    def counted(*args: Any, **kwargs: Any) -> Any:
        preemptions.append(args)
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counted
    for at, prompt in enumerate(prompts):
        engine.add_request(str(at), {"prompt_token_ids": prompt}, asked)
    while engine.has_unfinished_requests():
        for output in engine.step():
            done[int(output.request_id.partition("-")[0])] = output
        if squeezed and taken is None and len(done) == len(prompts):  # all of them decode
            taken = pool.get_new_blocks(pool.get_num_free_blocks())
        if taken and any(output.finished for output in done.values()):
            pool.free_blocks(taken)
            taken = []
    scheduler._preempt_request = preempt
    outputs = [done[at] for at in range(len(prompts))]
    return {
        "answers": [answered(output.outputs[0]) for output in outputs],
        "hits": [output.num_cached_tokens for output in outputs],
        "preemptions": [len(preemptions)],
    }


def answered(completion: Any) -> dict[str, Any]:
    """Tokens of an answer, and the best ones of each position with their log-probabilities."""
    steps = [{int(token): entry.logprob for token, entry in step.items()} for step in completion.logprobs]
    return {"tokens": list(completion.token_ids), "steps": steps}


def checkpoint(family: Any, folder: Path, write: Any) -> Path:
    """A family's folder, written if it is not there."""
    if not (folder / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(family, folder)
    return folder


class Place(NamedTuple):
    """Where answers differ: at which token of which.

    Attributes:
        answer, position: from 0.
        nats: between log-probabilities of one token; where tokens part, how much worse either found the other's,
            infinite where that is not among its best.
        tied: the tokens where they part are as good as tied.
    """

    answer: int
    position: int
    nats: float
    tied: bool = False


def places(ours: Answers, theirs: Answers) -> tuple[Place | None, list[Place]]:
    """Where log-probabilities of the same token are furthest apart before answers part, and where they part."""
    largest, parted = None, []
    for at, pair in enumerate(zip(ours, theirs, strict=True)):
        for position, _ in enumerate(pair[0]["tokens"]):
            one = [[{k: values[position : position + 1] for k, values in row.items()}] for row in pair]
            found = compare(*one)
            if found["partings"]:
                parted.append(Place(at, position, found["worst_parting"], found["worst_parting"] <= TIE_NATS))
                break
            if largest is None or not found["max"] <= largest.nats:
                largest = Place(at, position, found["max"])
    return largest, parted


def judge_fault(
    faulty: Answers, sound: Answers, theirs: Answers, noise: dict[str, float] | None, dtype: str
) -> tuple[float, bool]:
    """How far answers with a fault are from vLLM's, and whether that, or where they part, is not as of sound ones."""
    cut = [[{k: values[:FAULTY_TOKENS] for k, values in row.items()} for row in rows] for rows in (sound, theirs)]
    whole, peer = (rows[: len(faulty)] for rows in cut)
    row, wrong = judge(faulty, peer, noise, dtype)
    return row["mean"], bool(wrong) or row["partings"] > compare(whole, peer)["partings"]


def judge(ours: Answers, theirs: Answers, noise: dict[str, float] | None, dtype: str) -> tuple[dict[str, float], str]:
    """How far LEXICO is from vLLM, and what is wrong with that, "" where nothing is.

    Args:
        ours, theirs: answers.
        noise: how far vLLM in bfloat16 is from vLLM in float16; None where that is not known.
        dtype: of the model in the engine.
    """
    row = compare(ours, theirs)
    if dtype == "float32" or noise is None:
        parts = row["partings"] > 0 if dtype == "float32" else row["worst_parting"] > TIE_NATS
        wrong = parts or not row["max"] <= MOST_APART[dtype]
        return row, f"log-probabilities are up to {row['max']:.1e} apart" if wrong else ""
    if not row["mean"] <= ALLOWED_RATIO * noise["mean"]:
        return row, f"{row['mean']:.1e} apart in the mean, {dtype} itself {noise['mean']:.1e}"
    far = row["worst_parting"] > max(TIE_NATS, noise["worst_parting"])
    return row, f"answers part where tokens are {row['worst_parting']:.2f} nats apart, no tie" if far else ""
