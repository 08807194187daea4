"""`vllm-lexico train` and models that LEXICO does not serve: what `check` says of them is said before work begins."""

import json

import pytest

from vllm_lexico import cli
from vllm_lexico.train import rounds, run, writing

HEADS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = HEADS | {"model_type": "llama", "num_key_value_heads": 2, "intermediate_size": 64}
MLA = HEADS | {
    "model_type": "deepseek_v3", "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64, "n_routed_experts": 4, "n_group": 1,
}  # fmt: skip
MISTRAL = LLAMA | {"model_type": "mistral", "head_dim": 64, "sliding_window": 256, "max_position_embeddings": 2048}


@pytest.fixture
def write(tmp_path):
    """Write a folder that has a config.json alone; returns its name."""

    def written(config: dict) -> str:
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        return str(tmp_path / "model")

    return written


@pytest.fixture
def nothing_starts(monkeypatch):
    def start(*_, **__):
        raise AssertionError("work has started")

    for module, name in ((rounds, "load_model"), (rounds, "texts_of"), (run, "texts_of"), (writing, "write")):
        monkeypatch.setattr(module, name, start)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (MLA, "multi-head latent attention (MLA) is not supported"),
        (LLAMA | {"head_dim": 16}, "head size 16 is not supported"),
        ({"model_type": "bloom", "n_layer": 1, "hidden_size": 256, "n_head": 4}, "ALiBi position biases"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder and encoder-decoder attention is not supported"),
        (MISTRAL | {"head_dim": 16}, "head size 16 is not supported"),
        ({"model_type": "mamba"}, "has no attention layer whose cache grows with the context"),
    ],
)
@pytest.mark.parametrize("data", [False, True])
def test_what_is_never_served_is_refused_as_by_check(write, texts, capsys, nothing_starts, config, words, data):
    folder = write(config)
    assert cli.main(["check", folder, "--json"]) == 1
    reasons = [one for one in json.loads(capsys.readouterr().out)["reasons"] if "sliding window" not in one]
    assert cli.main(["train", folder, *(["--data", *texts] if data else [])]) == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"vllm-lexico: error: LEXICO does not serve {folder}") and words in said.err
    assert said.err.endswith(f": {'; '.join(reasons)}\n") and said.err.count("\n") == 1 and not said.out


@pytest.mark.parametrize(
    ("config", "flags", "warns"),
    [
        (MISTRAL, [], True),
        (MISTRAL, ["--max-model-len", "257"], True),
        (MISTRAL, ["--max-model-len", "256"], False),
        (MISTRAL, ["--hf-overrides", '{"sliding_window": 2048}'], False),
        (MISTRAL | {"sliding_window": None}, [], False),
    ],
)
def test_windows_in_all_layers_are_warned_of(write, capsys, monkeypatch, config, flags, warns):
    def read(*_):
        raise ValueError("training has begun")

    monkeypatch.setattr(run, "read_facts", read)
    assert cli.main(["train", write(config), *flags]) == 2
    *warning, error = capsys.readouterr().err.splitlines()
    assert error == "vllm-lexico: error: training has begun" and len(warning) == warns
    if warns:
        assert "look back 256 tokens" in warning[0] and "only with --disable-sliding-window or with" in warning[0]
        assert warning[0].endswith("--max-model-len 256 or less")
