"""Workarounds for vLLM that are part of another module's own work: where, why, and when they can go."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workaround:
    """One that is part of another module's work.

    where: "module:function or class" of this package.
    why: what vLLM does or lacks.
    upstream: the issue or pull request to follow; empty where nobody has asked for it yet.
    until: what has to be in the oldest vLLM that is supported before it can go.
    """

    where: str
    why: str
    upstream: str
    until: str


VLLM = "https://github.com/vllm-project/vllm"
ELSEWHERE = (
    Workaround(
        "vllm_lexico.serve.backend:LexicoBackend.bound_to",
        "`customize_spec` is a class method that is handed a spec and no configuration, so a loaded layer gets a "
        "subclass that knows it",
        f"{VLLM}/pull/51704",
        "backends return their cache specs themselves (issues 42082 and 42449)",
    ),
    Workaround(
        "vllm_lexico.serve.backend:LexicoBackend.get_supported_kernel_block_sizes",
        "one method answers both for the default block size and for cutting the blocks of a spec in pieces",
        f"{VLLM}/issues/24280",
        "the two questions are two methods",
    ),
    Workaround(
        "vllm_lexico.serve.tail_pages:LexicoTailSpec.num_retained_tokens",
        "the worker of 0.33 nulls what lies below the window, the sinks among it",
        "",
        "a spec can name pages at the start of a sequence that stay",
    ),
    Workaround(
        "vllm_lexico.serve.tail_hits:completing",
        "hits are looked for on the manager's class, so what a step is about to complete is kept beside the class",
        f"{VLLM}/pull/37505",
        "`find_longest_cache_hit` is a method of the manager",
    ),
    Workaround(
        "vllm_lexico.evals.peers:fix_turboquant",
        "TurboQuant forgets what is cached of a request that goes on beside one that starts",
        f"{VLLM}/issues/46460",
        "pull request 46461, or what takes its place",
    ),
    Workaround(
        "vllm_lexico.evals.held:PoolMeter",
        "vLLM reports the use of the whole pool and not what a sequence held, so `free` of its manager is wrapped",
        "",
        "a request's output says how many blocks it held",
    ),
    Workaround(
        "vllm_lexico.evals.engine:Engine.chunks_of",
        "`long_prefill_token_threshold` does not hold for a request that is alone, so the budget of a step is set too",
        f"{VLLM}/pull/57951",
        "the threshold can be made to hold always",
    ),
    Workaround(
        "vllm_lexico.evals.engine:unread_caches",
        "the CPU platform takes names of caches that its backend does not know",
        "",
        "0.33, whose CPU platform refuses them",
    ),
    Workaround(
        "vllm_lexico.train.vllm_writer:inspect_here",
        "to learn what a model's class can do, a process is started that imports vLLM once more",
        "",
        "an engine in its caller's process looks at the class there",
    ),
)
