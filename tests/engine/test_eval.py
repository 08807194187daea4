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
PAIRS = 4  # of keys and values, more than two code pages too
CHUNK, WINDOW, SINKS = 64, 64, 16
CACHE = f"lexico:2+window={WINDOW}+sinks={SINKS}"  # codes lose so much that it shows in a few tokens
FOLDER = f"lexico-2-window-{WINDOW}-sinks-{SINKS}"
# In float32, so that nothing but codes is lost. A code page has 128 tokens of 12 bytes per head: room for 2 in float32.
PAGE = 2
RAW = {"sinks": SINKS, "window": WINDOW + 1, "chunk": CHUNK, "page": PAGE}  # the window and the chunk's first token
# vLLM takes the name on a CPU, keeps most layers in eight bits, which it does not read as such, and answers nonsense.
ABSENT = "turboquant_4bit_nc"


@pytest.fixture(scope="module")
def dictionary(root):
    return root / "dictionaries" / "HuggingFaceTB_SmolLM2-135M-Instruct.safetensors"


@pytest.fixture(scope="module")
def out(smollm2, root, dictionary, tmp_path_factory):
    """The folder that an evaluation of two caches leaves; it ends with status 2, because one of them fails."""
    folder = tmp_path_factory.mktemp("eval")
    text = "\n\n".join((root / name).read_text(encoding="utf-8") for name in ("examples/lighthouse.txt", "LICENSE"))
    (folder / "wikitext2_raw_test.txt.xz").write_bytes(lzma.compress(text.encode()))
    (folder / "train_textbooks.jsonl.xz").write_bytes(lzma.compress(json.dumps({"text": text}).encode()))
    command = [sys.executable, "-m", "vllm_lexico.cli", "eval", str(smollm2), "--data", str(folder)]
    command += ["--out", str(folder / "out"), "--tasks", "wikitext,needle,pairs", "--caches", f"{ABSENT},{CACHE}"]
    command += ["--dictionary", str(dictionary), "--engine-arguments", '{"dtype": "float32"}']
    command += ["--wikitext-windows", "2", "--wikitext-length", str(LENGTH), "--wikitext-skip", str(SKIP)]
    command += ["--chunk-tokens", str(CHUNK)]
    command += ["--needle-lengths", str(LENGTH), "--needle-samples", "1", "--needle-keys", "2", "--enforce-eager"]
    command += ["--pairs", str(PAIRS), "--pairs-samples", "1"]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert result.returncode == 2, (result.stdout + result.stderr)[-4000:]
    missing = f"3 of 6 results are missing: {ABSENT} pairs, {ABSENT} wikitext, {ABSENT} needle"
    assert missing in result.stderr, result.stderr[-4000:]
    return folder / "out"


def rows(out, task):
    return [json.loads(line) for line in (out / FOLDER / f"{task}.jsonl").read_text().splitlines()]


def test_bytes_are_those_of_the_pool(out):
    result = json.loads((out / FOLDER / "wikitext.json").read_text())
    # 30 layers, 3 heads, K and V: 6 bytes per vector of 64 numbers in codes, 128 in 16 bits
    assert (result["token_bytes"], result["plain_token_bytes"]) == (1_080, 23_040)
    # Three code pages of 128 tokens for 320, and raw pages of 2: the sinks, and those of the last step, which computes
    # tokens 256 to 319. It reads the 64 before it raw, which 32 pages hold, and leaves its own 64 raw, for another 32.
    pages = result["held"]["all"]["bytes"] / (1_080 * 128)
    assert result["held"]["all"]["sequences"] == 2 and result["held"]["all"]["tokens"] == LENGTH
    assert pages == 3 + SINKS / PAGE + 32 + 32


@pytest.fixture(scope="module")
def read_windows(out, smollm2, dictionary, import_benchmark):
    """Losses of both windows in transformers, as floats: `read_windows(codec, **raw)`, raw as `read_raw` takes it.

    codec: "coded", "zeros", which gives back nothing, or None for keys and values as they are.
    """
    import torch
    from transformers import AutoTokenizer

    from vllm_lexico.dictionary.file import load_dictionary
    from vllm_lexico.evals.tasks.windows import wikitext_windows

    coded_model = import_benchmark("bench.coded_model")
    codec = import_benchmark("bench.vector_codecs").DictionaryCodec(load_dictionary(dictionary), "cpu", 2, 2)
    codecs = {"coded": codec, "zeros": lambda layer, kv, vectors: torch.zeros_like(vectors), None: None}
    path = out.parent / "wikitext2_raw_test.txt.xz"
    windows = wikitext_windows(path, AutoTokenizer.from_pretrained(smollm2), LENGTH, 2)
    model = coded_model.CodedPerplexity(str(smollm2), "cpu", skip=SKIP)

    def read(codec, **raw):
        model.read_raw(**RAW | raw)
        return model.negative_log_likelihood(windows, codecs[codec], batch=2).tolist()

    return read


def test_the_loss_out_of_codes_is_the_codec_s_own(out, read_windows):
    """The engine's loss is that of transformers reading the same tokens through the same codec; other readings are not.

    Within 2 % of what the codes cost: 2 % of the loss itself would be 0.1 nats, as much as a fault may cost.
    """
    engine = [row["loss"] for row in rows(out, "wikitext")]
    plain, coded = read_windows(None), read_windows("coded")
    others = [read_windows("zeros"), read_windows("coded", page=128)]
    assert [row["tokens"] for row in rows(out, "wikitext")] == [LENGTH - 1 - SKIP] * 2
    print(f"engine {engine}, coded {coded}, plain {plain}, others {others}")
    for at, loss in enumerate(engine):
        cost = coded[at] - plain[at]
        assert 0.02 < cost < 3 and abs(loss - coded[at]) < 0.02 * cost
        assert all(abs(loss - other[at]) > 0.02 * cost for other in others)


def test_documents_come_out_of_the_cache(out):
    answers = rows(out, "needle")
    assert [row["kind"] for row in answers] == ["single", "multi", "multi"]
    assert all(row["cached_tokens"] == 256 and row["answer"] for row in answers)
    (row,) = rows(out, "pairs")
    assert row["pairs"] == PAIRS and row["answer"] and len(row["value"]) == 36
    assert row["cached_tokens"] == 256 and 300 < row["prompt_tokens"] < 512


def test_what_failed_says_why(out):
    failures = json.loads((out / "metrics.json").read_text())["caches"][ABSENT]["failures"]
    reason = f"its CPU_ATTN does not know {ABSENT}; the platform does not have this cache"
    assert set(failures) == {"wikitext", "needle", "pairs"} and reason in failures["needle"]
