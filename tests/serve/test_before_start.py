"""What is refused or decided in the process that the user started, from vLLM's arguments to its configuration."""

import json
import logging
import shlex
from dataclasses import replace

import pytest

pytest.importorskip("vllm")
import vllm_lexico
from vllm_lexico import compat, last_word
from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.serve.setup import LexicoSetup
from vllm_lexico.train.model import read_facts

FP8_SCHEME = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 4096}
BLOCKS = "--block-size {} is not supported; give 64, 128 or 256, or leave it out for 128"


@pytest.fixture(scope="module")
def configure(tiny_llama, tmp_path_factory):
    """Make vLLM's configuration of a Llama with other settings in its config.json, as `LLM` and `vllm serve` do."""
    from vllm.engine.arg_utils import EngineArgs

    vllm_lexico.register()
    plain = json.loads((tiny_llama / "config.json").read_text())
    made = {}

    def configure(model=None, lexico=None, **arguments):
        text = json.dumps(plain | (model or {}))
        if text not in made:
            made[text] = tmp_path_factory.mktemp("model")
            (made[text] / "config.json").write_text(text)
        usual = {"attention_backend": "LEXICO", "additional_config": {"lexico": lexico or {"codec": "exact"}}}
        usual |= {"max_model_len": 512, "enforce_eager": True, "skip_tokenizer_init": True}
        return EngineArgs(str(made[text]), **usual | arguments).create_engine_config()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(logging.getLogger("vllm"), "propagate", True)
        yield configure


def refused(configure, *arguments, **named):
    with pytest.raises(ValueError) as error:
        configure(*arguments, **named)
    said = str(error.value)
    assert said.isprintable()
    return said


def test_settings(configure):
    assert "unknown LEXICO setting 'sparcity'" in refused(configure, lexico={"sparcity": 7})
    said = refused(configure, additional_config={"sparsity": 7})
    assert """put it under that key: '{"lexico": {"sparsity": 7}}'""" in said
    assert "add --attention-backend LEXICO" in refused(configure, attention_backend=None)
    assert "add --attention-backend LEXICO" in refused(configure, attention_backend="CPU_ATTN")


@pytest.mark.parametrize("size", [16, 32, 48, 96, 512])
def test_block_sizes(configure, size):
    assert BLOCKS.format(size) in refused(configure, block_size=size)


def test_what_is_supported(configure):
    for arguments in ({}, {"block_size": 64}, {"block_size": 256}, {"kv_cache_dtype": "bfloat16"}):
        assert compat.serves_lexico(configure(**arguments))


def test_dictionaries(configure, root, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # not for all: vLLM keeps model classes there
    assert "no dictionary for" in refused(configure, additional_config={})
    path = tmp_path / "broken.safetensors"
    path.write_bytes(b"not a dictionary at all")
    said = refused(configure, lexico={"dictionary": str(path)})
    assert str(path) in said and "damaged" in said
    (path,) = (root / "dictionaries").glob("*SmolLM2-135M*.safetensors")
    said = refused(configure, lexico={"dictionary": str(path)})
    assert "does not fit" in said and "num_layers: 30 in the dictionary, 4 in the model" in said


def test_a_dictionary_that_was_replaced_is_for_engines_that_start_later(strong_llama, load_benchmark, tmp_path):
    """All in one process, as a notebook trains and serves."""
    from vllm.engine.arg_utils import EngineArgs

    vllm_lexico.register()
    path, setups = tmp_path / "dictionary.safetensors", []
    lexico = {"lexico": {"dictionary": str(path)}}
    for seed in range(2):
        load_benchmark("bench/shapes").write_random_dictionary(strong_llama, 32, seed).rename(path)
        arguments = EngineArgs(str(strong_llama), attention_backend="LEXICO", additional_config=lexico)
        setups.append(LexicoSetup.of(arguments.create_engine_config()))
    first, second = (setup.dictionary().tensors["key_atoms"] for setup in setups)
    assert not first.equal(second) and second.equal(load_dictionary(path).tensors["key_atoms"])


def test_a_rotary_embedding_that_was_changed(strong_llama, strong_dictionary, tmp_path, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    vllm_lexico.register()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "vllm-lexico").mkdir()
    dictionary, own = load_dictionary(strong_dictionary), tmp_path / "vllm-lexico" / "strong.safetensors"
    replace(dictionary, info=replace(dictionary.info, model_name=str(strong_llama))).save(own)
    overrides = {"rope_parameters": YARN}
    arguments = EngineArgs(str(strong_llama), hf_overrides=overrides, attention_backend="LEXICO", max_model_len=512)
    said = refused(arguments.create_engine_config)
    assert f"no dictionary for {strong_llama} as it is served ({own} differs; rope: " in said
    assert '"rope_type": "default"} in the dictionary' in said and '"rope_type": "yarn"} in the model' in said
    command = shlex.split(said.partition("GPU): ")[2])
    assert command[:3] == ["vllm-lexico", "train", str(strong_llama)] and json.loads(command[4]) == overrides
    changed = ModelFingerprint.of(arguments.create_model_config().hf_text_config)
    assert read_facts(str(strong_llama), command[4]).fingerprint == changed  # what training makes is what is looked for


def test_engines_and_models(configure):
    strict = {"codec": "exact", "prefix_hits": "window"}
    assert "start without --kv-offloading-size" in refused(configure, lexico=strict, kv_offloading_size=1.0)
    assert configure(kv_offloading_size=1.0).kv_transfer_config.kv_connector == "OffloadingConnector"
    said = refused(configure, disable_hybrid_kv_cache_manager=True)
    assert "hybrid KV cache manager is off" in said
    said = refused(configure, {"head_dim": 72})
    assert "head size 72 is not supported, only 64, 80, 96, 112, 128, 192 or 256" in said


@pytest.mark.parametrize("flag", ["--decode-context-parallel-size", "-dcp"])
def test_decode_context_parallelism_is_refused_before_anything_is_spawned(configure, flag):
    """What vLLM itself allows: more ranks than KV heads."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    sizes = {"tensor_parallel_size": 4, "decode_context_parallel_size": 2}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    assert configure(heads, **sizes, attention_backend="CPU_ATTN", additional_config={})
    assert "leave --decode-context-parallel-size at 1" in refused(configure, heads, **sizes)
    model = configure(heads).model_config.model
    words = ["--model", model, "--attention-backend", "LEXICO", "--tensor-parallel-size", "4", flag, "2"]
    words += ["--skip-tokenizer-init", "--additional-config", '{"lexico": {"codec": "exact"}}']
    given = EngineArgs.from_cli_args(EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words))
    assert "leave --decode-context-parallel-size at 1" in refused(given.create_engine_config)


def test_cache_dtypes(configure):
    for dtype in ("fp8", "float16"):
        said = refused(configure, kv_cache_dtype=dtype)
        assert f"a KV cache in {dtype} is not supported" in said and "--kv-cache-dtype bfloat16" in said
    said = refused(configure, kv_cache_dtype="bfloat16", dtype="float32")
    assert "start with --dtype bfloat16 --kv-cache-dtype bfloat16" in said


@pytest.mark.parametrize("quantization", ["modelopt", "compressed-tensors"])
def test_a_checkpoints_scheme_for_its_cache_is_not_followed(configure, caplog, quantization):
    """`auto` is fp8 for both; --kv-cache-dtype bfloat16 wins over both in vLLM."""
    model = {"quantization_config": {"quant_method": quantization, "ignore": ["lm_head"]}}
    if quantization == "modelopt":
        model["quantization_config"]["quantization"] = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
        model["quantization_config"]["quantization"]["exclude_modules"] = ["lm_head"]
    else:
        model["quantization_config"] |= {"config_groups": {}, "kv_cache_scheme": FP8_SCHEME}
    with caplog.at_level(logging.INFO, "vllm.lexico"):
        assert configure(model).cache_config.cache_dtype == "bfloat16"
    assert "the checkpoint asks for a KV cache in fp8" in caplog.text and "the rest is bfloat16" in caplog.text
    assert configure(model, dtype="float16").cache_config.cache_dtype == "float16"
    plain = configure(model, attention_backend="CPU_ATTN", additional_config={})
    assert plain.cache_config.cache_dtype == ("fp8_e4m3" if quantization == "modelopt" else "auto")
    assert "a KV cache in fp8 is not supported" in refused(configure, model, kv_cache_dtype="fp8")


def test_windows_of_all_layers(configure):
    for window in (262144, 512):  # as in Phi-4-mini, and the shortest that never binds
        assert compat.serves_lexico(configure({"sliding_window": window}))
    said = refused(configure, {"sliding_window": 511})
    assert "a sliding window of 511 tokens" in said and "a sequence may have 512" in said
    assert "start with --disable-sliding-window, which limits sequences to the window" in said
    off = configure({"sliding_window": 511}, disable_sliding_window=True, max_model_len=None)
    assert off.model_config.max_model_len == 511 and off.cache_config.sliding_window is None


EVERY_SECOND = {"layer_types": ["sliding_attention", "full_attention"] * 2}


@pytest.mark.parametrize("window", [262144, 100])
def test_windows_of_some_layers_are_left_to_vllm(configure, window):
    config = configure(EVERY_SECOND | {"sliding_window": window})
    assert config.attention_config.backend_per_kind == {"sliding_window": None}
    assert config.attention_config.backend.name == "LEXICO" and config.cache_config.block_size == 128


def test_windows_of_another_backend(configure):
    model = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 100}
    per_kind = {"backend": "LEXICO", "backend_per_kind": {"sliding_window": "CPU_ATTN"}}
    configure(model, attention_backend=None, attention_config=per_kind)


def test_other_engines_are_left_alone(configure, monkeypatch):
    """Without LEXICO and its settings the check is not even imported."""
    monkeypatch.setattr(vllm_lexico, "_check_before_start", None)
    config = configure(attention_backend="CPU_ATTN", additional_config={"sparsity": 7}, block_size=16)
    assert not compat.serves_lexico(config) and config.cache_config.block_size == 16


def test_the_check_is_installed_once():
    from vllm.engine.arg_utils import EngineArgs

    before = EngineArgs.create_engine_config
    vllm_lexico.register()
    assert EngineArgs.create_engine_config is before and before.lexico


def test_a_workers_refusal_is_the_last_word(configure, monkeypatch):
    """What a process below writes is raised where the user's process would end with "initialization failed"."""
    import pickle

    from vllm.v1.engine import utils

    def fails(*_):
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setattr(utils, "wait_for_engine_startup", fails)
    backend = configure().attention_config.backend
    assert utils.wait_for_engine_startup is not fails and fails.__name__ == utils.wait_for_engine_startup.__name__
    with pytest.raises(RuntimeError, match="initialization failed"):
        utils.wait_for_engine_startup()
    path = last_word.path()
    monkeypatch.setattr(last_word, "_path", None)
    pickled = pickle.dumps(backend)
    assert pickle.loads(pickled) is backend and last_word.path() is None
    monkeypatch.setattr(last_word, "_path", path)
    pickled = pickle.dumps(backend)
    monkeypatch.setattr(last_word, "_path", None)
    assert pickle.loads(pickled) is backend and last_word.path() == path
    with pytest.raises(ValueError, match="soft cap"), last_word.kept():
        raise ValueError("a soft cap is not supported")
    with pytest.raises(ValueError, match=r"^a soft cap is not supported$"):
        utils.wait_for_engine_startup()
    with pytest.raises(RuntimeError, match="initialization failed"):  # said once
        utils.wait_for_engine_startup()


def test_nothing_is_said_where_there_is_no_file(monkeypatch, tmp_path):
    for path in (None, str(tmp_path / "gone" / "refusal"), str(tmp_path / "refusal")):
        monkeypatch.setattr(last_word, "_path", path)
        last_word.say("nobody reads this")
        assert last_word.take() == "" and not list(tmp_path.iterdir())
