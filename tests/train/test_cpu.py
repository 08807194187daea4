"""What the tool chooses on a CPU: the dtype that it computes fast, and a line that says what is learned from what."""

from dataclasses import replace

import pytest

from vllm_lexico import cli
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.train import settings
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.settings import Plan, TrainSettings, cpu_dtype, cpu_words


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fma avx2", "float32"), ("avx512f avx512_bf16", "auto"), ("amx_bf16 amx_tile", "auto"), ("asimd bf16", "auto")],
)
def test_a_cpu_computes_in_what_it_is_fast_at(tmp_path, monkeypatch, flags, expected):
    (tmp_path / "cpuinfo").write_text(f"model name : some\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(settings, "CPU_FACTS", tmp_path / "cpuinfo")
    assert cpu_dtype("auto") == expected
    assert cpu_dtype("bfloat16") == "bfloat16"
    monkeypatch.setattr(settings, "CPU_FACTS", tmp_path / "absent")
    assert cpu_dtype("auto") == "float32"


def test_float32_is_counted_as_what_it_holds(monkeypatch):
    fingerprint = ModelFingerprint("llama", 2, 2, 16, 64, "{}")  # 256 bytes per token in 16 bits, 512 in float32
    given = TrainSettings(vectors=8192, sequence_tokens=64, rounds=1, dtype="float32")
    monkeypatch.setattr(settings, "ROUND_BYTES", {"cpu": 4096 * 256})
    assert Plan.of(given, fingerprint, 2048, "cpu").rounds == 2
    assert Plan.of(replace(given, dtype="bfloat16"), fingerprint, 2048, "cpu").rounds == 1


def test_the_line_says_what_was_chosen(tmp_path):
    given = TrainSettings(learn=LearnSettings(atoms=512, shared=True), vectors=8192, text_tokens=256, dtype="float32")
    words = cpu_words(given, Plan(2, 5, 1, 8192))
    assert "in float32, 22,528 tokens of its own text (256 each), 8,192 vectors" in words
    assert "2 rounds, 512 atoms that heads share; a GPU learns from more" in words
    assert "the given text" in cpu_words(replace(given, data=(str(tmp_path),)), Plan(2, 5, 1, 8192))
    assert " 1 round, 512 atoms" in cpu_words(given, Plan(1, 5, 1, 8192))


def test_it_is_printed_once_before_work_begins(tiny_model, tmp_path, capsys):
    small = ["--atoms", "16", "--vectors", "512", "--sequence-tokens", "64", "--passes", "1", "--rounds", "1"]
    small += ["--writer", "transformers", "--device", "cpu", "--out", str(tmp_path / "d.safetensors")]
    assert cli.main(["train", str(tiny_model), *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("on a CPU: the model in ") and sum(line.startswith("on a CPU") for line in lines) == 1
    assert cli.main(["train", str(tiny_model), "--device", "cpu", "--text-tokens", "8"]) == 2
    assert "--text-tokens is 8; allowed: 64 or more" in capsys.readouterr().err
