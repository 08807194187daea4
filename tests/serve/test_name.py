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


def gone(monkeypatch, owner, name):
    monkeypatch.delattr(owner, name)


def registers_nothing(monkeypatch, registry):
    monkeypatch.setattr(registry.AttentionBackendEnum, "register", classmethod(lambda cls, name, value: None))


def pickles_by_value(monkeypatch, registry):
    def ignore(self, name, value):
        if name != "__reduce_ex__":
            object.__setattr__(self, name, value)

    monkeypatch.setattr(registry.AttentionBackendEnum, "__setattr__", ignore, raising=False)


def takes_other_arguments(monkeypatch, cpu):
    monkeypatch.setattr(cpu.CpuPlatform, "get_attn_backend_cls", classmethod(lambda cls, config, backend: ""))


CHANGES = {  # what a later vLLM might rename of what registering needs
    "register_backend": lambda patch, registry, cpu: gone(patch, registry, "register_backend"),
    "AttentionBackendEnum": lambda patch, registry, cpu: gone(patch, registry, "AttentionBackendEnum"),
    "registry": lambda patch, registry, cpu: patch.setitem(sys.modules, registry.__name__, None),
    "register": lambda patch, registry, cpu: registers_nothing(patch, registry),
    "__reduce_ex__": lambda patch, registry, cpu: pickles_by_value(patch, registry),
    "is_cpu": lambda patch, registry, cpu: gone(patch, cpu.Platform, "is_cpu"),
    "get_attn_backend_cls": lambda patch, registry, cpu: gone(patch, cpu.CpuPlatform, "get_attn_backend_cls"),
    "selected_backend": lambda patch, registry, cpu: takes_other_arguments(patch, cpu),
}


@pytest.mark.parametrize("renamed", CHANGES)
def test_what_vllm_renames_breaks_nothing_but_lexico(config, renamed, monkeypatch):
    """A vLLM that merely has this package installed gets one warning; asked for, LEXICO is refused with a sentence."""
    from vllm.config import AttentionConfig
    from vllm.platforms import cpu, current_platform
    from vllm.v1.attention.backends import registry

    from vllm_lexico import compat

    if not current_platform.is_cpu() and renamed in ("get_attn_backend_cls", "selected_backend"):
        pytest.skip("this vLLM is not for CPUs")
    compat._forget_backend_name("LEXICO")
    compat._warn_once.cache_clear()
    said = []
    monkeypatch.setattr(compat.logger, "warning", said.append)
    with monkeypatch.context() as patch:
        CHANGES[renamed](patch, registry, cpu)
        vllm_lexico.register()
        vllm_lexico.register()
        with pytest.raises(ValueError, match="LEXICO is not available, all else is as it was"):
            compat.registered_member()
    (warning,) = said
    assert "LEXICO is not available, all else is as it was: this is vLLM" in warning and "\n" not in warning
    with pytest.raises(ValueError, match="Unknown attention backend: 'LEXICO'"):
        AttentionConfig(backend="LEXICO")
    assert AttentionConfig(backend="CPU_ATTN").backend in list(registry.AttentionBackendEnum)
    vllm_lexico.register()
    assert AttentionConfig(backend="LEXICO").backend.get_class().get_name() == "LEXICO"
