"""Everything that `vllm-lexico check` finds out, as plain values."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from vllm_lexico.check import memory, verdict
from vllm_lexico.check.dictionary import DictionaryState, find_state
from vllm_lexico.check.memory import Load, Plan
from vllm_lexico.check.model import (
    ModelShape,
    NothingCodedError,
    bytes_per_parameter,
    check_length,
    read_shape,
)
from vllm_lexico.check.source import Weights, config_folder, find_weights
from vllm_lexico.errors import check_whole_number, either, refusal
from vllm_lexico.train.model import check_overrides, count_parameters

GIB = 1 << 30
# Of vLLM 0.32 and 0.33: the share of a GPU's memory that an engine takes, and the tokens of a step of `vllm serve` on
# GPUs of at least so many GiB.
UTILIZATION = 0.92
CHUNKS = ((160, 16384), (70, 8192), (0, 2048))
# What an engine takes beside weights and cache, so that the sum is what was measured for Llama-3.1-8B's shape on an
# H200 with steps of 16,384 tokens (`kv_cache_tokens` of benchmarks/results/engine.jsonl: 2.4 GiB).
FIXED_ALLOWANCE = GIB // 2
LOGIT_ROWS = 256
MOST_GPUS = 64


@dataclass(frozen=True)
class Asked:
    """What the user asks about.

    gpu_memory: bytes of each GPU; assumed: as no GPU is here and none was named.
    max_model_len, chunk_tokens: None for what vLLM takes by itself.
    kv_cache: bytes of the cache on each GPU, as vLLM's --kv-cache-memory-bytes; None to count them.
    """

    model: str
    gpu_memory: int
    max_model_len: int | None = None
    gpus: int = 1
    utilization: float = UTILIZATION
    chunk_tokens: int | None = None
    kv_cache: int | None = None
    overrides: str = ""
    assumed: bool = False

    def __post_init__(self) -> None:
        remedy = "leave it out for what vLLM takes by itself"
        check_whole_number("--tensor-parallel-size", self.gpus, 1, 1024, "leave it out for 1")
        if self.max_model_len is not None:
            check_whole_number("--max-model-len", self.max_model_len, 1, 10**9, remedy)
        if self.chunk_tokens is not None:
            check_whole_number("--max-num-batched-tokens", self.chunk_tokens, 1, 10**7, remedy)
        if not 0 < self.utilization <= 1:
            raise ValueError(refusal("--gpu-memory-utilization", self.utilization, "above 0, up to 1", remedy))
        if self.overrides:
            check_overrides(self.overrides)

    @property
    def step_tokens(self) -> int:
        """Most tokens of a step of `vllm serve` on such a GPU."""
        return self.chunk_tokens or next(tokens for least, tokens in CHUNKS if self.gpu_memory >= least * GIB)


@dataclass(frozen=True)
class Budget:
    """Bytes on each GPU. weights: None where they are not known and so not counted."""

    total: int
    weights: int | None
    weights_from: str
    allowance: int
    dictionary: int
    cache: int


@dataclass(frozen=True)
class Row:
    """One cache. sparsity: None for the model's own in 16 bits."""

    sparsity: int | None
    plan: Plan
    tokens: int


@dataclass(frozen=True)
class Report:
    """The answer. reasons: why the model is not served; then there are neither a budget nor rows.

    known_shape: None where nothing of the model would be coded.
    """

    asked: Asked
    known_shape: ModelShape | None
    reasons: list[str]
    max_model_len: int
    dictionary: DictionaryState | None = None
    budget: Budget | None = None
    rows: tuple[Row, ...] = ()

    @property
    def shape(self) -> ModelShape:
        """The shape of a model of which some layers could be coded."""
        assert self.known_shape is not None
        return self.known_shape

    @property
    def supported(self) -> bool:
        """Whether LEXICO serves the model."""
        return not self.reasons

    @property
    def command(self) -> str:
        """That serves the model."""
        words = ["vllm", "serve", self.asked.model, "--attention-backend", "LEXICO"]
        if self.asked.max_model_len is not None:
            words += ["--max-model-len", str(self.max_model_len)]
        if self.asked.gpus > 1:
            words += ["--tensor-parallel-size", str(self.asked.gpus)]
        if self.asked.utilization != UTILIZATION:
            words += ["--gpu-memory-utilization", f"{self.asked.utilization:g}"]
        if self.asked.kv_cache is not None:
            words += ["--kv-cache-memory-bytes", str(self.asked.kv_cache)]
        if self.asked.chunk_tokens is not None:
            words += ["--max-num-batched-tokens", str(self.asked.chunk_tokens)]
        if self.asked.overrides:
            words += ["--hf-overrides", self.asked.overrides]
        if verdict.text_alone(self.shape):
            words += verdict.TEXT_ALONE
        return shlex.join(words)


def make_report(asked: Asked) -> Report:
    """Find out everything, without a GPU and without weights.

    Raises:
        ValueError: the model is not there, its configuration cannot be read, or the settings do not fit it.
    """
    folder = config_folder(asked.model)
    try:
        shape = read_shape(asked.model, str(folder), asked.overrides)
    except NothingCodedError as error:
        return Report(asked, None, [str(error)], 0)
    max_model_len = check_length(asked.max_model_len, shape)
    _check_gpus(asked.gpus, shape)
    reasons = verdict.reasons_against(shape, max_model_len)
    if reasons:
        return Report(asked, shape, reasons, max_model_len)
    overrides = json.dumps(json.loads(asked.overrides), sort_keys=True) if asked.overrides else ""
    dictionary = find_state(shape, max_model_len, asked.gpus, overrides, asked.gpu_memory)
    budget = _budget(asked, shape, find_weights(asked.model, folder), dictionary)
    load = Load(max_model_len, asked.step_tokens, asked.gpus)
    plain = memory.plain_plan(shape, load)
    without = budget.cache if asked.kv_cache is not None else budget.cache + dictionary.num_bytes
    rows = [Row(None, plain, plain.tokens(without, max_model_len))]
    for sparsity in memory.sensible_sparsities(shape.heads.size):
        plan = memory.coded_plan(shape, sparsity, load)
        rows.append(Row(sparsity, plan, plan.tokens(budget.cache, max_model_len)))
    return Report(asked, shape, reasons, max_model_len, dictionary, budget, tuple(rows))


def _check_gpus(gpus: int, shape: ModelShape) -> None:
    """Refuse a tensor-parallel size that vLLM does: query heads are dealt out alike, KV heads alike or repeated."""
    heads, queries = shape.heads.number, getattr(shape.text, "num_attention_heads", None)
    queries = queries if isinstance(queries, int) and queries > 0 else heads
    sizes = [size for size in range(1, queries + 1) if queries % size == 0 and (heads % size == 0 or size % heads == 0)]
    if gpus not in sizes:
        words = f"{either(sizes)}, by which the model's {queries} query heads and {heads} KV heads can be dealt out"
        raise ValueError(refusal("--tensor-parallel-size", gpus, words, "give one of these"))


def _budget(asked: Asked, shape: ModelShape, weights: Weights | None, dictionary: DictionaryState) -> Budget:
    if weights is None:
        numbers, each = count_parameters(shape.whole), bytes_per_parameter(shape.whole)
        words = "its configuration" if numbers else "nothing: neither files nor configuration tell"
        weights = Weights(int((numbers or 0) * each), words)
    own = -(-weights.num_bytes // asked.gpus)
    allowance = _allowance(asked, shape)
    left = int(asked.gpu_memory * asked.utilization) - own - allowance - dictionary.num_bytes
    cache = left if asked.kv_cache is None else asked.kv_cache
    return Budget(asked.gpu_memory, own or None, weights.known_from, allowance, dictionary.num_bytes, cache)


def _allowance(asked: Asked, shape: ModelShape) -> int:
    """Bytes that a step of the most tokens works with, and what CUDA takes: an estimate."""
    text = shape.text
    wide = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    wide = max(wide) if isinstance(wide, list) else wide
    if experts := getattr(text, "num_experts_per_tok", None):
        wide = experts * (getattr(text, "moe_intermediate_size", None) or wide)
    step = asked.step_tokens * 2 * (4 * text.hidden_size + 3 * wide // asked.gpus)
    return FIXED_ALLOWANCE + step + LOGIT_ROWS * text.vocab_size * 4


def gpus_needed(report: Report) -> int | None:
    """GPUs that hold the weights, a power of two; None where these do already, or are not known."""
    budget, gpus = report.budget, report.asked.gpus
    if budget is None or not budget.weights or budget.cache > 0 or report.asked.kv_cache is not None:
        return None
    room = int(budget.total * report.asked.utilization) - budget.allowance
    while room > 0 and gpus < MOST_GPUS:
        gpus *= 2
        if budget.weights * report.asked.gpus / gpus < room:
            return gpus
    return None


def as_json(report: Report) -> dict[str, Any]:
    """Plain values; bytes are those of each GPU."""
    if report.known_shape is None:
        return {"model": report.asked.model, "supported": False, "reasons": report.reasons}
    shape, dictionary, budget = report.shape, report.dictionary, report.budget
    found: dict[str, Any] = {
        "model": shape.name,
        "model_type": shape.text.model_type,
        "supported": report.supported,
        "reasons": report.reasons,
        "layers": shape.num_layers,
        "coded_layers": list(shape.coded) if report.supported else [],
        "other_layers": [{"kind": one.kind, "layers": list(one.layers)} for one in shape.others],
        "head_size": shape.heads.size,
        "kv_heads": shape.heads.number,
        "max_model_len": report.max_model_len,
        "longest_context": shape.longest,
        "gpus": report.asked.gpus,
    }
    if dictionary is None or budget is None:
        return found
    found["dictionary"] = {
        "path": str(dictionary.path) if dictionary.path else None,
        "made_for": dictionary.made_for,
        "own": dictionary.own,
        "atoms": dictionary.atoms,
        "train_command": dictionary.command,
        "train_minutes": round(dictionary.minutes, 1),
        "train_minutes_based_on": dictionary.based_on,
        "note": dictionary.several,
    }
    found["memory"] = {
        "gpu_bytes": budget.total,
        "utilization": report.asked.utilization,
        "weight_bytes": budget.weights,
        "weights_known_from": budget.weights_from,
        "allowance_bytes": budget.allowance,
        "dictionary_bytes": budget.dictionary,
        "cache_bytes": budget.cache,
        "max_num_batched_tokens": report.asked.step_tokens,
    }
    plain = report.rows[0]
    found["caches"] = [
        {
            "cache": "bf16" if row.sparsity is None else f"sparsity {row.sparsity}",
            "sparsity": row.sparsity,
            "default": row.sparsity == memory.SETTINGS.sparsity.key,
            "bytes_per_token": row.plan.token_bytes,
            "share_of_bf16": round(row.plan.token_bytes / plain.plan.token_bytes, 4),
            "request_bytes": row.plan.request_bytes,
            "other_request_bytes": row.plan.other_bytes,
            "tokens": row.tokens,
            "fits": row.tokens >= report.max_model_len,
            "times_bf16": round(row.tokens / plain.tokens, 2) if plain.tokens else None,
        }
        for row in report.rows
    ]
    found["serve_command"] = report.command
    return found
