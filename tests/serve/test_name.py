"""The name LEXICO: known wherever vLLM reads one, and in processes that unpickle a config before they load plugins."""

import copy
import pickle
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
import vllm_lexico


@pytest.fixture(scope="module")
def config():
    vllm_lexico.register()
    vllm_lexico.register()  # vLLM may load plugins more than once
    from vllm.config import AttentionConfig

    return AttentionConfig(backend="LEXICO")


@pytest.mark.parametrize("name", ["LEXICO", "lexico"])
def test_command_line_and_llm(config, name):
    from vllm.config import AttentionConfig

    assert AttentionConfig(backend=name).backend is config.backend
    assert config.backend.get_class().get_name() == "LEXICO"


def test_attention_config_as_json(config):
    from pydantic import TypeAdapter
    from vllm.config import AttentionConfig

    read = TypeAdapter(AttentionConfig).validate_json('{"backend": "LEXICO"}')
    assert read.backend is config.backend


def test_copies_are_the_same_member(config):
    assert copy.deepcopy(config).backend is config.backend
    assert pickle.loads(pickle.dumps(config)).backend is config.backend


def test_a_fresh_process_unpickles_it(config):
    """As a spawned engine does, before any plugin is loaded there."""
    code = "import pickle, sys; print(pickle.load(sys.stdin.buffer).backend.get_class().get_name())"
    result = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(config), capture_output=True)
    assert result.stdout.decode().split()[-1:] == ["LEXICO"], result.stderr.decode()[-2000:]


def test_other_names_stay_unknown(config):
    from vllm.config import AttentionConfig

    with pytest.raises(Exception, match="LEXIKO"):  # a pydantic error, or vLLM's own
        AttentionConfig(backend="LEXIKO")


def test_the_cpu_platform_takes_it_and_keeps_its_own(config):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this vLLM is not for CPUs")
    assert current_platform.get_attn_backend_cls.lexico


def test_an_untested_vllm_gets_a_warning(monkeypatch, caplog):
    import vllm

    from vllm_lexico import compat

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    compat.warn_of_untested_version.cache_clear()
    monkeypatch.setattr(compat.logger, "propagate", True)
    monkeypatch.setattr(compat.logging.getLogger("vllm"), "propagate", True)
    compat.warn_of_untested_version()
    assert "tested with vLLM 0.32 and 0.33; this is 0.99.0" in caplog.text
