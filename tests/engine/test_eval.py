"""`vllm-lexico eval` end to end: a real model on the CPU, codes that are really read, and a cache that cannot start."""

import json
import lzma
import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
LENGTH = 320  # of a window and of a document with its question: more than two code pages
SKIP = 64
CACHE = "lexico:3+window=0+sinks=0"  # little is kept raw, and codes lose so much that it shows in a few tokens
FOLDER = "lexico-3-window-0-sinks-0"
# vLLM takes the name on a CPU, keeps most layers in eight bits, which it does not read as such, and answers nonsense.
ABSENT = "turboquant_4bit_nc"


@pytest.fixture(scope="module")
def out(smollm2, root, tmp_path_factory):
    """The folder that an evaluation of two caches leaves; it ends with status 2, because one of them fails."""
    folder = tmp_path_factory.mktemp("eval")
    text = (root / "docs" / "design" / "memory.md").read_text(encoding="utf-8")
    (folder / "wikitext2_raw_test.txt.xz").write_bytes(lzma.compress(text.encode()))
    (folder / "train_textbooks.jsonl.xz").write_bytes(lzma.compress(json.dumps({"text": text}).encode()))
    command = [sys.executable, "-m", "vllm_lexico.cli", "eval", str(smollm2), "--data", str(folder)]
    command += ["--out", str(folder / "out"), "--tasks", "wikitext,needle", "--caches", f"{ABSENT},{CACHE}"]
    command += ["--dictionary", str(root / "dictionaries" / "HuggingFaceTB_SmolLM2-135M-Instruct.safetensors")]
    command += ["--wikitext-windows", "2", "--wikitext-length", str(LENGTH), "--wikitext-skip", str(SKIP)]
    command += ["--needle-lengths", str(LENGTH), "--needle-samples", "1", "--needle-keys", "2", "--enforce-eager"]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert result.returncode == 2, (result.stdout + result.stderr)[-4000:]
    missing = f"2 of 4 results are missing: {ABSENT} wikitext, {ABSENT} needle"
    assert missing in result.stderr, result.stderr[-4000:]
    return folder / "out"


def rows(out, task):
    return [json.loads(line) for line in (out / FOLDER / f"{task}.jsonl").read_text().splitlines()]


def test_bytes_are_those_of_the_pool(out):
    result = json.loads((out / FOLDER / "wikitext.json").read_text())
    # 30 layers, 3 heads, K and V: 8 bytes a vector of 64 numbers in codes, 128 in bf16
    assert (result["token_bytes"], result["plain_token_bytes"]) == (1_440, 23_040)
    # Three code pages of 128 tokens for 320, and raw pages of 8. The last step computes tokens 256 to 319: it reads the
    # 63 before it raw, which eight pages hold, and leaves its own last 63 raw, for another eight.
    pages = result["held"]["all"]["bytes"] / (1_440 * 128)
    assert result["held"]["all"]["sequences"] == 2 and result["held"]["all"]["tokens"] == LENGTH
    assert pages == 3 + 8 + 8


def test_windows_are_read_out_of_the_codes(out, smollm2):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from vllm_lexico.evals.tasks.windows import wikitext_windows

    path = out.parent / "wikitext2_raw_test.txt.xz"
    windows = wikitext_windows(path, AutoTokenizer.from_pretrained(smollm2), LENGTH, 2)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)(windows).logits.log_softmax(-1)
    plain = -logits[:, :-1].gather(2, windows[:, 1:, None])[:, SKIP:, 0].mean(1)
    for row, loss in zip(rows(out, "wikitext"), plain.tolist(), strict=True):
        assert row["tokens"] == LENGTH - 1 - SKIP
        assert loss + 0.05 < row["loss"] < loss + 3


def test_documents_come_out_of_the_cache(out):
    answers = rows(out, "needle")
    assert [row["kind"] for row in answers] == ["single", "multi", "multi"]
    assert all(row["cached_tokens"] == 256 and row["answer"] for row in answers)


def test_what_failed_says_why(out):
    failures = json.loads((out / "metrics.json").read_text())["caches"][ABSENT]["failures"]
    reason = f"its CPU_ATTN does not know {ABSENT}; the platform does not have this cache"
    assert set(failures) == {"wikitext", "needle"} and reason in failures["needle"]
