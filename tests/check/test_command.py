"""What the command prints: words for people, their numbers from where they belong, and what may not be asked."""

import json
import os
import subprocess
import sys

import pytest

from vllm_lexico import cli
from vllm_lexico.cli.check import parse_size
from vllm_lexico.dictionary.names import file_name

LENGTH = 4096


def lines_of(capsys, *arguments, status=0):
    assert cli.main(["check", *arguments]) == status
    return capsys.readouterr().out.splitlines()


def test_what_a_person_reads(write_family, capsys):
    folder = write_family("Llama-3.1-8B")
    lines = lines_of(capsys, folder, "--gpu-memory", "24GiB", "--max-model-len", "32768", "--json")
    caches = json.loads("\n".join(lines))["caches"]
    lines = lines_of(capsys, folder, "--gpu-memory", "24GiB", "--max-model-len", "32768")
    assert lines[0] == f"{folder} (llama): LEXICO serves it."
    table = lines[lines.index(next(line for line in lines if line.startswith("cache "))) :][: 1 + len(caches)]
    assert len({len(line) for line in table}) == 1  # aligned
    for line, row in zip(table[1:], caches, strict=True):
        name = {None: "bf16", 15: "sparsity 15 (default)"}.get(row["sparsity"], f"sparsity {row['sparsity']}")
        assert (
            line.startswith(f"{name}  ") and f" {row['tokens']:,}  " in line and f"{row['bytes_per_token']:,}" in line
        )
        assert abs(float(line.split()[-1]) - row["times_bf16"]) <= 0.055  # of two decimals and of one
    command = f"vllm serve {folder} --attention-backend LEXICO --max-model-len 32768"
    assert f"Serve it          {command}" in lines
    words = " ".join(" ".join(lines).split())
    assert f"none yet. Make it once: vllm-lexico train {folder} (about 2 minutes on one H100" in words
    assert "predicted from 110 s measured for Qwen/Qwen2.5-Coder-1.5B-Instruct" in words
    assert max(map(len, lines)) <= max(110, len(command) + 20)


def test_a_dictionary_that_is_there(write_family, write_dictionary, cache, capsys):
    folder = write_family("Qwen3-8B")
    mine = write_dictionary(folder, cache / file_name(folder), name=folder)
    words = " ".join(" ".join(lines_of(capsys, folder)).split())
    assert f"found: {mine} (64 atoms)" in words and "vllm-lexico train" not in words
    other = write_dictionary(folder, mine.rename(cache / "other.safetensors"), name="org/base")
    words = " ".join(" ".join(lines_of(capsys, folder)).split())
    assert f"found: {other} (64 atoms, made for org/base, which has the same shape)" in words
    write_dictionary(folder, cache / "third.safetensors", name="org/third")
    words = " ".join(" ".join(lines_of(capsys, folder)).split())
    assert "those of several other models fit its shape" in words and "vllm-lexico train" in words
    found = json.loads("\n".join(lines_of(capsys, folder, "--json")))["dictionary"]
    assert found["path"] is None and "org/third" in found["note"]


def test_a_refusal_has_a_status_of_its_own(write_family, capsys):
    lines = lines_of(capsys, write_family("DeepSeek-V3"), status=1)
    assert lines[0].endswith("(deepseek_v3): LEXICO does not serve it.")
    assert any("multi-head latent attention" in line for line in lines)


def test_too_little_memory_is_said(write_family, capsys):
    folder = write_family("Llama-3.1-8B")
    words = " ".join(" ".join(lines_of(capsys, folder, "--gpu-memory", "12GiB")).split())
    assert "The weights alone do not fit: try --tensor-parallel-size 2." in words and "cache 0.0 GiB" in words
    words = " ".join(" ".join(lines_of(capsys, folder, "--gpu-memory", "19GiB")).split())
    assert "Not one request of that length fits" in words and "not one request -" in words
    lines = lines_of(capsys, folder, "--gpu-memory", "19.5GiB", "--max-model-len", "8192")
    assert any(line.startswith("sparsity 7") and "not one request" not in line for line in lines)


def test_what_cannot_be_served_has_advice_and_no_command(write_family, capsys):
    folder = write_family("Llama-3.1-8B")
    for flags, advice in (
        (["--gpu-memory", "12GiB"], "The weights alone do not fit: try --tensor-parallel-size 2."),
        (["--gpu-memory", "19GiB"], "give a shorter --max-model-len, a larger --tensor-parallel-size, or GPUs with"),
        (["--gpu-memory", "0.1GiB"], "Nothing is left for a cache: weights, dictionary and what vLLM works with take "),
        (["--kv-cache-memory-bytes", "1MiB"], "give a larger --kv-cache-memory-bytes or leave it out"),
    ):
        words = " ".join(" ".join(lines_of(capsys, folder, *flags)).split())
        assert advice in words and "vllm serve" not in words


def test_memory_that_nobody_named_is_said_to_be_assumed(write_family, capsys, monkeypatch):
    folder = write_family("Llama-3.1-8B")
    monkeypatch.setattr("vllm_lexico.cli.check._memory_here", lambda: 0)
    assert "80.0 GiB, assumed, as no GPU is here (--gpu-memory), of" in " ".join(lines_of(capsys, folder))
    assert "assumed" not in " ".join(lines_of(capsys, folder, "--gpu-memory", "80GiB"))
    monkeypatch.setattr("vllm_lexico.cli.check._memory_here", lambda: 24 << 30)
    assert "24.0 GiB, of" in " ".join(lines_of(capsys, folder))


def test_numbers_are_written_out(write_family, capsys):
    for flag in ("--max-model-len", "--max-num-batched-tokens", "--tensor-parallel-size"):
        with pytest.raises(SystemExit):
            cli.main(["check", write_family("Llama-3.1-8B"), flag, "32k"])
        assert f"argument {flag}: '32k' is no whole number; write it out, such as 32768" in capsys.readouterr().err


def test_a_model_that_one_gpu_does_not_hold(write_family, capsys):
    words = " ".join(" ".join(lines_of(capsys, write_family("Qwen3-Next-80B"), "--gpu-memory", "80GiB")).split())
    assert "minutes on H100s that hold its weights with --data" in words
    assert "The weights alone do not fit: try --tensor-parallel-size 4." in words
    assert "and the states of the layers that have one." in words


def test_images_that_are_seen_both_ways_are_left_out_of_the_prompt(write_family, capsys):
    lines = lines_of(capsys, write_family("Gemma-3-27B"))
    assert any(line.startswith("Serve it") and """--limit-mm-per-prompt '{"image": 0}'""" in line for line in lines)
    assert any("a smaller --max-num-batched-tokens" in line or "--max-num-batched-tokens" in line for line in lines)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("80GiB", 80 << 30), ("80", 80 << 30), ("24 GB", 24 * 10**9), ("512mib", 512 << 20), ("1.5g", 3 << 29)],
)
def test_sizes(given, expected):
    assert parse_size("--gpu-memory", given) == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpu-memory", "80 apples"], "--gpu-memory was given as '80 apples'; allowed: a size such as 80GiB"),
        (["--gpu-memory", "0"], "--gpu-memory was given as '0'"),
        (["--kv-cache-memory-bytes", "-1"], "--kv-cache-memory-bytes was given as '-1'"),
        (["--max-model-len", "131073"], "--max-model-len was given as 131073; allowed: 1 to 131,072"),
        (["--max-model-len", "0"], "--max-model-len was given as 0"),
        (["--tensor-parallel-size", "0"], "--tensor-parallel-size was given as 0"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization was given as 1.5; allowed: above 0, up to 1"),
        (["--max-num-batched-tokens", "0"], "--max-num-batched-tokens was given as 0"),
        (["--hf-overrides", "[]"], "--hf-overrides was given as '[]'; allowed: a JSON object"),
    ],
)
def test_what_may_not_be_asked(flags, words, write_family, capsys):
    if flags[0] == "--kv-cache-memory-bytes":
        flags = [f"{flags[0]}={flags[1]}"]
    assert cli.main(["check", write_family("Llama-3.1-8B"), "--gpu-memory", "80GiB", *flags]) == 2
    assert words in capsys.readouterr().err


def test_a_cache_of_a_given_size(write_family, capsys):
    flags = ["--max-model-len", str(LENGTH), "--kv-cache-memory-bytes", str(1 << 30), "--json"]
    found = json.loads("\n".join(lines_of(capsys, write_family("Llama-3.1-8B"), *flags)))
    assert found["memory"]["cache_bytes"] == 1 << 30
    assert found["caches"][0]["tokens"] == (1 << 30) // 131072  # of bf16, all of it
    assert f"--kv-cache-memory-bytes {1 << 30}" in lines_of(capsys, write_family("Llama-3.1-8B"), *flags[:-1])[-2]


def test_it_needs_no_vllm(write_family, tmp_path):
    code = "import sys; sys.modules['vllm'] = None; from vllm_lexico import cli; sys.exit(cli.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "check", write_family("gpt-oss-20b"), "--gpu-memory", "80GiB"]
    ended = subprocess.run(command, env=os.environ, capture_output=True, text=True)
    assert ended.returncode == 0 and "LEXICO serves it." in ended.stdout, ended.stderr[-2000:]


def test_without_transformers_it_says_what_to_install(write_family, monkeypatch, capsys):
    monkeypatch.setattr("vllm_lexico.check.model.find_spec", lambda name: None)
    assert cli.main(["check", write_family("Qwen3-8B"), "--gpu-memory", "80GiB"]) == 2
    assert "transformers, which reads configurations, is not installed" in capsys.readouterr().err
