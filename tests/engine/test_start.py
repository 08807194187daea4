"""What a user's terminal ends with when an engine does not start, and engines that start where they once did not."""

import json
import os
import subprocess
import sys

import pytest

vllm = pytest.importorskip("vllm")

START = """
import json, sys, vllm
if __name__ == "__main__":
    model, arguments = sys.argv[1], json.loads(sys.argv[2])
    vllm.LLM(model, load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, max_model_len=512, **arguments)
"""
ANSWER = """
import json, sys, vllm
llm = vllm.LLM(sys.argv[1], load_format="dummy", skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16",
               max_model_len=512, max_num_batched_tokens=64, **json.loads(sys.argv[2]))
prompt = [3 + at * at % 500 for at in range(300)]
asked = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
(output,) = llm.generate([{"prompt_token_ids": prompt}], asked, use_tqdm=False)
scores = [one[token].logprob for token, one in zip(prompt[1:], output.prompt_logprobs[1:], strict=True)]
scheduler = llm.llm_engine.engine_core.engine_core.scheduler
specs = [type(group.kv_cache_spec).__name__ for group in scheduler.kv_cache_config.kv_cache_groups]
print(json.dumps({"scores": scores, "specs": specs, "dtype": llm.llm_engine.vllm_config.cache_config.cache_dtype}))
"""


@pytest.fixture
def run(tmp_path):
    """Run a script, or a module's command line, in a process of its own."""

    def run(command, *, in_this_process=False):
        if not command[0].startswith("-"):
            script = tmp_path / "start.py"
            script.write_text(command[0])
            command = [str(script), *command[1:]]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        if in_this_process:
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)

    return run


@pytest.fixture
def write_model(tiny_llama, tmp_path):
    """Write a Llama with other settings in its config.json."""

    def write(**changes):
        folder = tmp_path / f"model-{len(changes)}"
        folder.mkdir()
        config = json.loads((tiny_llama / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


def last_line(result):
    assert result.returncode != 0, result.stdout[-2000:]
    return result.stderr.strip().splitlines()[-1]


def arguments(backend="LEXICO", **others):
    return json.dumps({"attention_backend": backend} | others)


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


def test_a_workers_refusal_is_repeated_last(run, write_model):
    """Only a layer's own arguments show that it is an encoder's."""
    model = write_model(is_causal=False)
    result = run([START, model, arguments(additional_config={"lexico": {"codec": "exact"}})])
    said = last_line(result)
    assert said.startswith("ValueError: LEXICO cannot serve this: encoder"), result.stderr[-3000:]
    assert "Engine core initialization failed" in result.stderr  # as vLLM ends by itself


def test_a_window_that_never_binds_and_a_checkpoints_scheme_for_its_cache(run, write_model):
    """Full attention in the model's dtype: the answers are those of the same model without window and scheme."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "attn_head", "symmetric": True, "dynamic": False}
    quantization = {"quant_method": "compressed-tensors", "config_groups": {}, "ignore": [], "kv_cache_scheme": scheme}
    model = write_model(sliding_window=262144, quantization_config=quantization)
    found = []
    for command in (
        [ANSWER, model, arguments(additional_config={"lexico": {"codec": "exact"}})],
        [ANSWER, write_model(), arguments("CPU_ATTN")],
    ):
        result = run(command, in_this_process=True)
        assert result.returncode == 0, result.stderr[-4000:]
        found.append(json.loads(result.stdout.strip().splitlines()[-1]))
    ours, peer = found
    assert ours["specs"] == ["FullAttentionSpec", "LexicoTailSpec"] and ours["dtype"] == "bfloat16"
    assert max(abs(a - b) for a, b in zip(ours["scores"], peer["scores"], strict=True)) < 0.05
