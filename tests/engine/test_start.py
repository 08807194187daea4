"""What stops an engine from starting says why, before a weight is loaded."""

import json
import os

import pytest

vllm = pytest.importorskip("vllm")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def start(model, lexico, **settings):
    settings = {"max_model_len": 512, "enforce_eager": True, "dtype": "float32"} | settings
    return vllm.LLM(
        str(model),
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend="LEXICO",
        additional_config={"lexico": lexico},
        **settings,
    )


def reason(model, lexico, **settings):
    with pytest.raises(Exception) as error:
        start(model, lexico, **settings)
    return str(error.value)


def test_no_dictionary(tiny_llama, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said = reason(tiny_llama, {})
    assert "no dictionary for" in said and f"vllm-lexico train {tiny_llama}" in said


def test_a_file_that_is_no_dictionary(tiny_llama, tmp_path):
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a dictionary at all")
    said = reason(tiny_llama, {"dictionary": str(path)})
    assert str(path) in said and "damaged" in said


def test_a_dictionary_of_another_model(tiny_llama, root):
    (path,) = (root / "dictionaries").glob("*SmolLM2-135M*.safetensors")
    said = reason(tiny_llama, {"dictionary": str(path)})
    assert "does not fit" in said and "num_layers: 30 in the dictionary, 4 in the model" in said


def test_an_unknown_setting(tiny_llama):
    assert "unknown LEXICO setting 'sparcity'" in reason(tiny_llama, {"sparcity": 7})


def test_hybrid_manager_off(tiny_llama):
    said = reason(tiny_llama, {"codec": "exact"}, disable_hybrid_kv_cache_manager=True)
    assert "hybrid KV cache manager is off" in said


def test_another_cache_number_format(tiny_llama):
    assert "--kv-cache-dtype fp8" in reason(tiny_llama, {"codec": "exact"}, kv_cache_dtype="fp8")


def test_an_unsupported_head_size(tiny_llama, tmp_path):
    config = json.loads((tiny_llama / "config.json").read_text()) | {"head_dim": 96}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "head size 96 is not supported" in reason(tmp_path, {"codec": "exact"})
