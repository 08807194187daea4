"""`vllm-lexico check` and vLLM's own start count the same."""

import functools
import json
import re

import pytest

pytest.importorskip("vllm")
from processes import in_a_process
from start_lines import started_cache

from vllm_lexico import cli
from vllm_lexico.check import memory, report

CACHE_GIB = 1  # VLLM_CPU_KVCACHE_SPACE of tests/conftest.py
LENGTH, CHUNK, SPARSITY = 2048, 512, 11


def test_bytes_per_token_and_tokens_are_those_of_the_start_line(strong_llama, strong_dictionary, capsys, monkeypatch):
    settings = {"dtype": "bfloat16", "max_model_len": LENGTH, "max_num_batched_tokens": CHUNK}
    lexico = {"sparsity": SPARSITY, "dictionary": str(strong_dictionary)}
    started = in_a_process(started_cache, str(strong_llama), lexico, settings)
    found = re.search(r"; ([\d,]+) bytes per token instead of ([\d,]+) .*; ([\d,]+) tokens fit", started["line"])
    coded, raw, tokens = (int(number.replace(",", "")) for number in found.groups())

    load = functools.partial(memory.Load, concurrent_batches=started["batches"])  # on a CPU it is not a GPU's
    monkeypatch.setattr(report, "Load", load)
    flags = ["--max-model-len", str(LENGTH), "--max-num-batched-tokens", str(CHUNK)]
    flags += ["--kv-cache-memory-bytes", f"{CACHE_GIB}GiB", "--gpu-memory", "80GiB"]
    assert cli.main(["check", str(strong_llama), *flags, "--json"]) == 0
    caches = {row["sparsity"]: row for row in json.loads(capsys.readouterr().out)["caches"]}
    assert (caches[SPARSITY]["bytes_per_token"], caches[None]["bytes_per_token"]) == (coded, raw)
    assert caches[SPARSITY]["tokens"] == tokens
    assert abs(tokens - started["tokens"]) <= 1  # vLLM rounds another way
