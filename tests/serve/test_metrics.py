"""What /metrics says of the cache, in one process and where several answer over HTTP."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("vllm")
import vllm_lexico
from vllm_lexico import compat
from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.serve import metrics

# What one of several API servers does; the one that is asked answers for all.
SERVER = """
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from vllm_lexico.config import LexicoConfig, Sparsity
from vllm_lexico.serve import metrics
from vllm_lexico.serve.setup import LexicoSetup

setup = LexicoSetup(LexicoConfig(sparsity=Sparsity(7, 7)), Path(sys.argv[1]), 0, 1)
metrics.publish(setup, SimpleNamespace(served_model_name="served", dtype=torch.bfloat16))
if sys.argv[2] == "answer":
    from prometheus_client import generate_latest
    from vllm.v1.metrics.prometheus import get_prometheus_registry, unregister_vllm_metrics

    unregister_vllm_metrics()
    print(generate_latest(get_prometheus_registry()).decode())
"""


def value(name, **labels):
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(name, labels)


@pytest.fixture
def configure(strong_llama):
    """Make the configuration of an engine, as `LLM` and `vllm serve` do."""
    from vllm.engine.arg_utils import EngineArgs

    vllm_lexico.register()

    def configure(name, lexico, **arguments):
        usual = {"attention_backend": "LEXICO", "max_model_len": 512, "skip_tokenizer_init": True}
        usual |= {"served_model_name": name, "additional_config": {"lexico": lexico}}
        return EngineArgs(str(strong_llama), **usual | arguments).create_engine_config()

    return configure


def test_a_dashboard_can_tell_what_is_served(configure, strong_dictionary):
    from vllm.v1.metrics.prometheus import unregister_vllm_metrics

    lexico = {"dictionary": str(strong_dictionary), "sparsity": {"key": 15, "value": 11}, "sinks": 40}
    configure("coded", lexico, dtype="bfloat16")
    unregister_vllm_metrics()  # as each start of an engine does
    labels = {"key_sparsity": "15", "value_sparsity": "11", "codec": "packed16", "version": vllm_lexico.__version__}
    labels |= {
        "dictionary_file": str(strong_dictionary),
        "window": "128",
        "sinks": "40",
        "prefix_hits": "codes",
        "uneven": "",
    }
    labels |= {"dictionary": load_dictionary(strong_dictionary).info.model_name, "model_name": "coded"}
    assert value(metrics.INFO, **labels) == 1
    # 4 layers, 2 heads: 15 + 11 entries and 2 scales of 2 bytes, against 2 x 64 numbers of 2 bytes
    assert value(metrics.TOKEN_BYTES, model_name="coded") == 8 * 56
    assert value(metrics.RAW_TOKEN_BYTES, model_name="coded") == 8 * 256
    assert value(metrics.EXACT_TOKENS, model_name="coded") == 128 + 48  # sinks in whole pages of 16


def test_the_exact_codec_has_no_dictionary_and_other_backends_no_metrics(configure):
    configure("exact", {"codec": "exact"})
    assert not compat.serves_lexico(configure("other", {}, attention_backend="CPU_ATTN", additional_config={}))
    (family,) = metrics._gauge(metrics.INFO, metrics.INFO_LABELS).collect()
    said = {sample.labels["model_name"]: sample.labels for sample in family.samples}
    assert said["exact"]["codec"] == "exact" and said["exact"]["dictionary"] == said["exact"]["key_sparsity"] == ""
    assert value(metrics.TOKEN_BYTES, model_name="exact") is None and "other" not in said


def test_several_processes_that_answer(strong_dictionary, tmp_path):
    environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SERVER, str(strong_dictionary)]
    for last in ("publish", "answer"):
        result = subprocess.run([*command, last], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
    lines = [line for line in result.stdout.splitlines() if line.startswith("lexico:")]
    assert len(lines) == 4 and 'lexico:bytes_per_token{model_name="served"} 256.0' in lines
