"""What is said of families of models, by their configuration alone."""

import json

import pytest
from configurations import FAMILIES

from vllm_lexico import cli

BESIDE = "have a state beside attention"
# Family, layers that are coded, layers that are not, KV heads and their size, tokens of the longest context and those
# that vLLM takes by itself.
SERVED = [
    ("Llama-3.1-8B", range(32), [], (8, 128), 131072, 131072),
    ("Llama-3.1-70B", range(80), [], (8, 128), 131072, 131072),
    ("Qwen3-8B", range(36), [], (8, 128), 40960, 40960),
    ("Qwen2.5-7B", range(28), [], (4, 128), 131072, 131072),
    ("Qwen2.5-VL-7B", range(28), [], (4, 128), 128000, 128000),
    ("Qwen3-VL-8B", range(36), [], (8, 128), 262144, 262144),
    ("Gemma-3-27B", range(5, 62, 6), [("with a window of 1,024 tokens", 52)], (16, 128), 131072, 131072),
    ("gpt-oss-20b", range(1, 24, 2), [("with a window of 128 tokens", 12)], (8, 64), 131072, 131072),
    ("Phi-4-mini", range(32), [], (8, 128), 131072, 4096),
    ("Llama-4-Scout", range(3, 48, 4), [("with attention in chunks of 8,192 tokens", 36)], (8, 128), 262144, 262144),
    ("Falcon-7B", range(32), [], (1, 64), 2048, 2048),
    ("Qwen3-Next-80B", range(3, 48, 4), [("with linear attention or Mamba", 36)], (2, 256), 262144, 262144),
    ("LFM2-1.2B", (2, 5, 8, 10, 12, 14), [("with short convolutions", 10)], (8, 64), 128000, 128000),
    (
        "Nemotron-3-Nano",
        (5, 12, 19, 26, 33, 42),
        [("with linear attention or Mamba", 23), ("without attention", 23)],
        (2, 128),
        262144,
        262144,
    ),
    ("Mistral-7B-v0.3", range(32), [], (8, 128), 32768, 32768),
    ("Mixtral-8x7B", range(32), [], (8, 128), 32768, 32768),
    ("Qwen3-30B-A3B", range(48), [], (4, 128), 40960, 40960),
    ("GLM-4-9B", range(40), [], (2, 128), 32768, 32768),
    ("SmolLM3-3B", range(36), [], (4, 128), 65536, 65536),
    ("GPT-2", range(12), [], (12, 64), 1024, 1024),
    ("Olmo-3-7B", range(3, 32, 4), [("with a window of 4,096 tokens", 24)], (32, 128), 65536, 65536),
    ("Command-R7B", range(3, 32, 4), [("with a window of 4,096 tokens", 24)], (8, 128), 132096, 132096),
    ("EXAONE-4.0-32B", range(3, 64, 4), [("with a window of 4,096 tokens", 48)], (8, 128), 131072, 131072),
    ("Gemma-3-12B", range(5, 48, 6), [("with a window of 1,024 tokens", 40)], (8, 256), 131072, 131072),
    ("Gemma-2-9B", range(1, 42, 2), [("with a window of 4,096 tokens", 21)], (8, 256), 8192, 8192),
    ("Qwen3.5-27B", range(3, 64, 4), [("with linear attention or Mamba", 48)], (4, 256), 262144, 262144),
    ("Granite-4.0-H-Small", range(5, 40, 10), [("with linear attention or Mamba", 36)], (8, 128), 131072, 131072),
    ("Falcon-H1-7B", range(44), [(BESIDE, 44)], (2, 128), 262144, 262144),
]
REFUSED = [
    (
        "Mistral-7B-v0.1",
        "layers with a sliding window of 4096 tokens are not supported where a",
    ),
    ("DeepSeek-V3", "multi-head latent attention (MLA) is not supported"),
    ("BLOOM-7B", "ALiBi position biases are not supported"),
    ("T5", "encoder and encoder-decoder attention is not supported"),
]


def check(capsys, *arguments, status=0):
    assert cli.main(["check", "--gpu-memory", "80GiB", "--json", *arguments]) == status
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("row", SERVED, ids=[row[0] for row in SERVED])
def test_what_is_served(row, write_family, capsys):
    name, coded, others, heads, longest, usual = row
    found = check(capsys, write_family(name))
    assert found["supported"] and found["reasons"] == []
    assert found["coded_layers"] == list(coded)
    assert [(one["kind"], len(one["layers"])) for one in found["other_layers"]] == others
    assert found["layers"] == len(coded) + sum(count for kind, count in others if kind != BESIDE)
    assert (found["kv_heads"], found["head_size"]) == heads
    assert (found["longest_context"], found["max_model_len"]) == (longest, usual)
    caches = {row["sparsity"]: row for row in found["caches"]}
    number, size = heads
    assert caches[None]["bytes_per_token"] == len(coded) * number * 2 * size * 2
    assert caches[15]["bytes_per_token"] == len(coded) * number * 2 * 2 * (15 + 1)  # a record has 2 (S + 1) bytes
    sparsities = {64: {23, 15, 11, 7}, 128: {31, 23, 15, 11, 7}, 256: {31, 23, 15}}[size]
    assert caches[15]["default"] and set(caches) == {None, *sparsities}


@pytest.mark.parametrize(("name", "reason"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_is_refused_in_the_words_of_serving(name, reason, write_family, capsys):
    found = check(capsys, write_family(name), status=1)
    assert not found["supported"] and len(found["reasons"]) == 1
    assert found["reasons"][0].startswith(reason), found["reasons"]
    assert "caches" not in found


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba2", "num_hidden_layers": 4}, "has no attention layer whose cache grows"),
        (
            {"model_type": "bert", "architectures": ["BertModel"]},
            "encoder and encoder-decoder attention is not supported",
        ),
    ],
)
def test_a_model_of_which_nothing_is_coded_is_not_served(config, reason, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = check(capsys, str(tmp_path), status=1)
    assert not found["supported"] and reason in found["reasons"][0]
    assert cli.main(["check", str(tmp_path), "--gpu-memory", "80GiB"]) == 1
    words = " ".join(capsys.readouterr().out.split())
    assert "LEXICO does not serve it. Why" in words and reason in words


def test_layers_that_are_coded_and_keep_a_state_are_named_once(write_family, capsys):
    assert cli.main(["check", "--gpu-memory", "80GiB", write_family("Falcon-H1-7B")]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "44 of 44 are coded (2 KV heads of 128); 44 have a state beside attention, which is left to vLLM" in words
    assert "are left to vLLM, as without" not in words and "and the states of the layers that have one" in words


def test_a_window_that_never_binds_is_full_attention(write_family, capsys):
    found = check(capsys, write_family("Mistral-7B-v0.1"), "--max-model-len", "4096")
    assert found["supported"] and found["coded_layers"] == list(range(32))


def test_heads_of_256_have_sparsities_that_were_measured(write_family, capsys):
    """A sixteenth of bf16 is the least, half of it what fp8 takes."""
    found = check(capsys, write_family("Qwen3-8B", head_dim=256))
    shares = {row["sparsity"]: row["share_of_bf16"] for row in found["caches"]}
    assert shares == {None: 1, 31: 0.125, 23: 0.0938, 15: 0.0625}


def test_yarn_by_overrides(write_family, capsys):
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32768}
    overrides = json.dumps({"rope_parameters": rope})
    found = check(capsys, write_family("Qwen3-8B"), "--hf-overrides", overrides, "--max-model-len", "131072")
    assert found["longest_context"] == 131072
    assert "--hf-overrides" in found["serve_command"] and "--hf-overrides" in found["dictionary"]["train_command"]


def test_gpus_share_heads_and_weights(write_family, capsys):
    folder = write_family("Llama-3.1-8B")
    one, two = check(capsys, folder), check(capsys, folder, "--tensor-parallel-size", "2")
    sixteen = check(capsys, folder, "--tensor-parallel-size", "16")
    bytes_per_token = [found["caches"][1]["bytes_per_token"] for found in (one, two, sixteen)]
    assert bytes_per_token == [32768, 16384, 4096]  # at least one head each
    assert two["memory"]["weight_bytes"] * 2 == one["memory"]["weight_bytes"]
    assert cli.main(["check", folder, "--tensor-parallel-size", "3"]) == 2
    words = "allowed: 1, 2, 4, 8, 16 or 32, by which the model's 32 query heads and 8 KV heads can be dealt out"
    assert words in capsys.readouterr().err
    assert cli.main(["check", write_family("Qwen2.5-7B"), "--tensor-parallel-size", "8"]) == 2
    assert "allowed: 1, 2, 4 or 28, by which the model's 28 query heads and 4 KV heads" in capsys.readouterr().err


def test_every_family_has_a_row():
    named = {row[0] for row in SERVED} | {name for name, _ in REFUSED}
    assert named == set(FAMILIES)
