"""What a user's terminal ends with when an engine does not start, and engines that start where they once did not."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
from engines import refusal_or_answer, score_a_prompt
from processes import in_a_process

ROUNDING = 0.1  # nats, mean over a prompt: what bfloat16 leaves with weights so large
START = """
import json, sys, vllm
if __name__ == "__main__":
    model, arguments = sys.argv[1], json.loads(sys.argv[2])
    vllm.LLM(model, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, max_model_len=512, **arguments)
"""


@pytest.fixture
def run(tmp_path):
    """Run a script, or a module's command line, in a process of its own."""

    def run(command):
        if not command[0].startswith("-"):
            script = tmp_path / "start.py"
            script.write_text(command[0])
            command = [str(script), *command[1:]]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)

    return run


@pytest.fixture
def write_model(tmp_path):
    """Copy a model with other settings in its config.json."""

    def write(model, **changes):
        folder = shutil.copytree(model, tmp_path / "model")
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


def last_line(result):
    assert result.returncode != 0, result.stdout[-2000:]
    return result.stderr.strip().splitlines()[-1]


def arguments(**others):
    return json.dumps({"attention_backend": "LEXICO"} | others)


def test_a_misspelt_setting_is_the_last_line_and_nothing_was_spawned(run, tiny_llama):
    result = run([START, str(tiny_llama), arguments(additional_config={"lexico": {"sparcity": 7}})])
    assert last_line(result).startswith("ValueError: unknown LEXICO setting 'sparcity'"), result.stderr[-2000:]
    assert "EngineCore" not in result.stdout + result.stderr


def test_the_server_ends_with_the_sentence_too(run, tiny_llama):
    flags = ["--attention-backend", "LEXICO", "--additional-config", '{"lexico": {"codec": "exact"}}']
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tiny_llama), "--skip-tokenizer-init", *flags]
    result = run([*command, "--block-size", "96"])
    said = last_line(result)
    assert "--block-size 96 is not supported; give 64, 128 or 256" in said, result.stderr[-2000:]
    assert "EngineCore" not in result.stdout + result.stderr


def test_a_workers_refusal_is_repeated_last(run, write_model, tiny_llama):
    """Only a layer's own arguments show that it is an encoder's."""
    model = write_model(tiny_llama, is_causal=False)
    result = run([START, model, arguments(additional_config={"lexico": {"codec": "exact"}})])
    said = last_line(result)
    assert said.startswith("ValueError: LEXICO cannot serve this: encoder"), result.stderr[-3000:]
    assert "Engine core initialization failed" in result.stderr  # as vLLM ends by itself


def test_a_prefix_language_model_is_refused(tmp_path):
    """HRM-Text was made causal in silence, and so answered otherwise from the second token of a prompt on."""
    from transformers import HrmTextConfig

    config = HrmTextConfig(
        vocab_size=100, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, head_dim=64,
        H_cycles=1, L_cycles=1, architectures=["HrmTextForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LEXICO cannot serve this: attention is a EncoderOnlyAttention"):
        in_a_process(score_a_prompt, str(tmp_path), "LEXICO", {"codec": "exact"}, {"load_format": "dummy"})


def distance(one, other):
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def test_a_window_that_never_binds_and_a_checkpoints_scheme_for_its_cache(write_model, strong_llama):
    """Full attention in the model's dtype: the answers are those of the same model without window and scheme."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True, "dynamic": False}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme}
    model = write_model(strong_llama, sliding_window=262144, quantization_config=quantization)
    ours = in_a_process(score_a_prompt, model, "LEXICO", {"codec": "exact"})
    peer = in_a_process(score_a_prompt, str(strong_llama), "CPU_ATTN", {})
    assert ours["specs"] == ["FullAttentionSpec", "LexicoTailSpec"] and ours["dtype"] == "bfloat16"
    assert distance(ours["scores"], peer["scores"]) < ROUNDING
    # No step of decode is asked for, so that zeros there are not seen.
    unseen = {fault for fault, scores in ours["faults"].items() if distance(scores, peer["scores"]) < ROUNDING}
    assert unseen == {"zeros"}


def test_a_changed_rotary_embedding_from_the_refusal_to_an_answer(strong_llama, tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
    settings = {"hf_overrides": {"rope_parameters": yarn}}
    refusal, _ = in_a_process(refusal_or_answer, str(tmp_path), str(strong_llama), settings)
    assert refusal.startswith("no dictionary for "), refusal
    command = shlex.split(refusal.partition("GPU): ")[2])
    command = [sys.executable, "-m", "vllm_lexico.cli", *command[1:], "--atoms", "32", "--vectors", "512"]
    command += ["--sequence-tokens", "128", "--passes", "1", "--rounds", "1", "--device", "cpu"]
    trained = subprocess.run(
        command, env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    refusal, said = in_a_process(refusal_or_answer, str(tmp_path), str(strong_llama), settings)
    (path,) = (tmp_path / "vllm-lexico").glob("*.safetensors")
    assert refusal == "" and any(f"(32 atoms, {path})" in line for line in said), (refusal, said)
