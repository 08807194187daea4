"""The engine end to end: with the exact codec LEXICO answers as vLLM's own backend on the CPU does, in every situation.

The model is real and computes in float32, so that what is left between the two is the order of additions. The same
scenarios run on a GPU, against two backends of vLLM, by `benchmarks/exactness.py`.
"""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")

# Log-probabilities in float32. CPU_ATTN differs from itself, alone against in a crowd, by 2e-6 on average and 1e-5 at
# most; bfloat16 would differ by 1e-2.
MEAN_GAP, MAX_GAP = 2e-5, 5e-4
TIE = 1e-3
SCENARIOS = ("plain", "shared_prefixes", "multi_turn", "crowd", "chunked", "same_step", "preempted")


@pytest.fixture(scope="session")
def table(root, smollm2, tmp_path_factory):
    """Rows of the comparison, by scenario and pair."""
    out = tmp_path_factory.mktemp("exactness")
    command = [sys.executable, root / "benchmarks" / "exactness.py", smollm2, "--out", out, "--scale", "1"]
    command += [
        "--backends",
        "CPU_ATTN",
        "LEXICO",
        "--settings",
        json.dumps({"enforce_eager": True, "dtype": "float32"}),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return {(row["scenario"], row["pair"]): row for row in json.loads((out / "table.json").read_text())}


def check(row):
    assert row["tokens"] >= 32
    assert row["mean"] <= MEAN_GAP and row["max"] <= MAX_GAP, row
    assert row["worst_parting"] <= TIE, row


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_exact_codec_answers_as_cpu_attn(table, scenario):
    check(table[scenario, "CPU_ATTN LEXICO"])


@pytest.mark.parametrize("scenario", ["shared_prefixes", "multi_turn"])
def test_prefix_hits_are_as_many(table, scenario):
    counts = table[scenario, "CPU_ATTN LEXICO"]["counts"]
    assert counts["LEXICO"]["hits"] >= counts["CPU_ATTN"]["hits"] > 0


def test_requests_were_preempted(table):
    counts = table["preempted", "CPU_ATTN LEXICO"]["counts"]
    assert counts["LEXICO"]["preemptions"] > 0 and counts["CPU_ATTN"]["preemptions"] > 0


def test_codes_answer_alike_alone_and_in_a_crowd(table):
    check(table["alone_and_in_crowd", "LEXICO with itself"])
