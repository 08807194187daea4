"""Text that a model writes under vLLM, in a process of its own: `python -m vllm_lexico.train.vllm_writer JOB.json`.

Nothing of the engine is left when the process ends. What it has to say goes to the standard output that it was started
with, a JSON object per line: {"tokens": written so far}, and at the end {"wrote": {...}} or {"error": a sentence}.
"""

import json
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_lexico.files import save_tensors
from vllm_lexico.processes import end_with_parent
from vllm_lexico.train.model import read_config
from vllm_lexico.train.own_text import end_tokens, read_tokenizer, text_tokens
from vllm_lexico.train.prompts import RECIPE, SHARES, Prompt, Prompts

TEXTS_AT_ONCE = {"cuda": 512, "cpu": 64}
CPU_CACHE_BYTES = 1 << 30  # vLLM's own choice, half of the memory, is more than a few texts need
LARGEST_SHARE = 0.9  # of a GPU's memory
SPARE_SHARE = 0.03  # of it, left of what is free
REPEAT_SECONDS = 2.0  # between two words of how far it is
GRAPHS = (16, 32, 64, 128, 256, 384, 512)  # texts of a step that a CUDA graph is captured for: it takes a second or two
MORE_TEXTS = 1.05  # than seem needed: the next wave, of few, takes as long as one text
# Tokens of a text, until some were met: too many texts cost less than another wave.
FIRST_GUESSES = {"chat": 400, "code": 500, "mathematics": 400, "documents": 1000, "languages": 400}


@dataclass(frozen=True)
class WriterJob:
    """What the process is told.

    Args:
        model: hub id or folder.
        out: the file of tokens that it writes.
        tokens: to write, at least.
        longest: tokens of a text with its prompt.
        device: "cuda" or "cpu".
        dtype: of the model; "auto" for its own.
        seed: of everything random.
        overrides: of the configuration, a JSON object, or "".
        to_the_end: see `Prompts`.
        gpus: that hold the model together, a power of two.
        most_bytes: of a GPU that it may count on, though more are free now; None for all that are.
        graphs: whether a GPU's steps are launched as CUDA graphs.
    """

    model: str
    out: str
    tokens: int
    longest: int
    device: str
    dtype: str
    seed: int
    overrides: str
    to_the_end: bool = False
    gpus: int = 1
    most_bytes: int | None = None
    graphs: bool = True

    def write(self, path: Path) -> None:
        """As `main` reads it."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def main() -> None:
    """Read the job, write the text, say what came of it."""
    end_with_parent()
    line = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints is a log

    lock, written = threading.Lock(), [0]
    times = [time.monotonic()]  # of the start, of the engine's readiness

    def tell(**words: Any) -> None:
        with lock:
            print(json.dumps(words), file=line, flush=True)

    def count(tokens: int) -> None:
        if not tokens:
            times.append(time.monotonic())
        written[0] = tokens
        tell(tokens=tokens)

    def repeat() -> None:  # vLLM is silent while it starts and until a text is finished
        while True:
            time.sleep(REPEAT_SECONDS)
            tell(tokens=written[0])

    threading.Thread(target=repeat, daemon=True).start()
    try:
        job = WriterJob(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
        made = write_text(job, count)
        tell(wrote=made, start_seconds=times[1] - times[0], write_seconds=time.monotonic() - times[1])
    except Exception as error:  # whatever vLLM raises: the parent says it in one line and goes on without
        tell(error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise
    if job.gpus == 1:  # nothing else runs, so the system takes the engine apart, which is sooner done
        os._exit(0)


def write_text(job: WriterJob, tell: Callable[[int], None]) -> dict[str, Any]:
    """Have vLLM write, wave by wave, until there is enough.

    Args:
        job: what is wanted.
        tell: called with the tokens written so far, with 0 when the engine is ready.

    Returns:
        What was done, as the dictionary will say it.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # one process, which ends whole, and the same order every time
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # cores of our choice may be busy
    # FlashInfer's sampler takes the likeliest tokens, which is not asked for here, and may be compiled at the start.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    import vllm

    config, tokenizer = read_config(job.model, job.overrides), read_tokenizer(job.model)
    text = config.get_text_config()
    words, start = text_tokens(config), text.bos_token_id
    prompts = Prompts(tokenizer, words, start, job.longest, job.seed, to_the_end=job.to_the_end)
    ends = end_tokens(job.model, text, tokenizer)
    inspect_here(config)
    llm = vllm.LLM(job.model, **engine_arguments(job, tokenizer is None))
    tell(0)
    texts: list[tuple[str, list[int]]] = []
    by_kind: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    marks = sorted(set(range(text.vocab_size)) - set(prompts.words))
    while by_kind.total() < job.tokens:
        wave = next_wave(prompts, by_kind, counts, job.tokens)
        params = [sampling(prompt, ends, marks) for prompt in wave]
        _count_steps(llm.llm_engine, TEXTS_AT_ONCE[job.device], by_kind.total(), tell)
        inputs: Any = [{"prompt_token_ids": list(prompt.ids)} for prompt in wave]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        for prompt, output in zip(wave, outputs, strict=True):
            texts.append((prompt.kind, [*prompt.ids, *output.outputs[0].token_ids]))
            by_kind[prompt.kind] += len(texts[-1][1])
            counts[prompt.kind] += 1
        tell(by_kind.total())
    random.Random(job.seed).shuffle(texts)
    save(Path(job.out), texts)
    return {
        "writer": f"vLLM {vllm.__version__}",
        "recipe": RECIPE,
        "chat_template": prompts.chats,
        "texts": counts.total(),
        "longest": job.longest,
        "tokens": {kind: by_kind[kind] for kind in sorted(by_kind)},
    }


def inspect_here(config: Any) -> None:
    """Have vLLM look at the model's class in this process, which imports it in any case.

    Else vLLM starts a process for it, lest CUDA be initialized here, which imports vLLM once more: 10 s and more, until
    a cache of its own knows the class. Here CUDA is used in this process anyway, and nothing is forked.

    config: of transformers.
    """
    with suppress(Exception):  # then vLLM looks by itself, and says what is wrong
        from vllm import ModelRegistry
        from vllm.plugins import load_general_plugins

        load_general_plugins()  # as in that process: they come before any model
        for name in config.architectures:
            ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())


def engine_arguments(job: WriterJob, without_tokenizer: bool) -> dict[str, Any]:
    """Of vLLM's LLM: an engine that starts fast, as large as what is free allows."""
    arguments: dict[str, Any] = {
        "dtype": job.dtype,
        "seed": job.seed,
        "max_model_len": job.longest,
        "max_num_seqs": TEXTS_AT_ONCE[job.device],
        "enable_prefix_caching": False,
        "skip_tokenizer_init": without_tokenizer,
    }
    if job.device == "cuda":
        free, total = torch.cuda.mem_get_info()
        free = free if job.most_bytes is None else min(free, job.most_bytes)
        arguments["gpu_memory_utilization"] = round(min(LARGEST_SHARE, free / total - SPARE_SHARE), 3)
    else:
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
    if job.device == "cuda" and job.graphs:
        arguments["compilation_config"] = {
            "mode": 0,  # compiling takes longer than it would save here
            "cudagraph_mode": "FULL_DECODE_ONLY",
            "cudagraph_capture_sizes": list(GRAPHS),
        }
    else:
        arguments["enforce_eager"] = True
    if job.gpus > 1:
        arguments["tensor_parallel_size"] = job.gpus
    if job.overrides:
        arguments["hf_overrides"] = json.loads(job.overrides)
    return arguments


def sampling(prompt: Prompt, ends: list[int], marks: list[int]) -> Any:
    """vLLM's SamplingParams of one text. ends: tokens that end a text; marks: tokens that are never taken."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=1.0,
        max_tokens=prompt.most_tokens,
        ignore_eos=prompt.to_the_end,
        stop_token_ids=None if prompt.to_the_end else ends,
        logit_bias=dict.fromkeys(marks, -100.0) or None,
        detokenize=False,
    )


def next_wave(prompts: Prompts, written: Counter[str], counts: Counter[str], wanted: int) -> list[Prompt]:
    """As many prompts as will fill what lacks, each kind by its share, those of long texts first.

    A wave lasts as long as its longest text, so all but the first are without documents.

    Args:
        prompts: of all kinds.
        written: tokens, by kind.
        counts: texts that they were, by kind.
        wanted: tokens in all.
    """
    expected, wave = {kind: float(written[kind]) for kind in SHARES}, []
    kinds = [kind for kind in prompts.kinds if not (kind == "documents" and written)]
    enough = written.total() + (wanted - written.total()) * MORE_TEXTS
    while sum(expected.values()) < enough:
        kind = min(kinds, key=lambda kind: expected[kind] / SHARES[kind])
        prompt = prompts.take(kind)
        most = len(prompt.ids) + prompt.most_tokens
        guess = written[kind] / counts[kind] if counts[kind] else FIRST_GUESSES.get(kind, most)
        expected[kind] += most if prompt.to_the_end else min(most, guess)
        wave.append(prompt)
    return sorted(wave, key=lambda prompt: -prompt.most_tokens)


def save(path: Path, texts: list[tuple[str, list[int]]]) -> None:
    """Write texts, each with its kind, as a safetensors file.

    `ids` int32, all texts one after the other; `lengths` int64, tokens of each; `kinds` int64, its place in SHARES.
    """
    kinds = list(SHARES)
    tensors = {
        "ids": torch.tensor([token for _, text in texts for token in text], dtype=torch.int32),
        "lengths": torch.tensor([len(text) for _, text in texts], dtype=torch.int64),
        "kinds": torch.tensor([kinds.index(kind) for kind, _ in texts], dtype=torch.int64),
    }
    save_tensors(path, tensors)


def _count_steps(engine: Any, at_once: int, before: int, tell: Callable[[int], None]) -> None:
    """Have vLLM's engine tell now and then how much is written, of which it says nothing until a text is finished.

    A step writes a token of every text that is under way. The instance's `step` is replaced; both names are public.
    """
    step, written, told = type(engine).step, before, time.monotonic()

    def counted() -> Any:
        nonlocal written, told
        written += min(engine.get_num_unfinished_requests(), at_once)
        if time.monotonic() - told > REPEAT_SECONDS:
            told = time.monotonic()
            tell(written)
        return step(engine)

    engine.step = counted


if __name__ == "__main__":
    main()
