"""Layers of vLLM that attend in another way than `Attention`: each is refused by its name, none loses its wrapper."""

import contextlib
import importlib
import pkgutil
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import torch
import vllm.model_executor.layers.attention as vllms_layers
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.chunked_local_attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention.encoder_only_attention import create_encoder_only_attention_backend
from vllm.model_executor.layers.attention.prefill_prefix_lm_attention import PrefillPrefixLMAttention
from vllm.model_executor.layers.attention.rswa_attention import RSWAAttention
from vllm.v1.attention.backend import subclass_attention_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

import vllm_lexico
from vllm_lexico.serve import refusals
from vllm_lexico.serve.backend import LexicoBackend
from vllm_lexico.serve.impl import LexicoImpl
from vllm_lexico.serve.metadata import LexicoMetadataBuilder

HEADS = {"num_heads": 4, "head_size": 64, "scale": 0.125, "num_kv_heads": 2}


@pytest.fixture
def engine_config(tiny_llama):
    """That of an engine with LEXICO, as a model meets it while it is built."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("this vLLM is not for CPUs")
    vllm_lexico.register()
    _cached_get_attn_backend.cache_clear()
    config = EngineArgs(
        model=str(tiny_llama),
        skip_tokenizer_init=True,
        load_format="dummy",
        attention_backend="LEXICO",
        additional_config={"lexico": {"codec": "exact"}},
    ).create_engine_config()
    with set_current_vllm_config(config):
        yield config


def test_plain_attention_is_served(engine_config, default_dtype):
    layer = Attention(**HEADS, cache_config=engine_config.cache_config, prefix="model.layers.0.attn")
    assert type(layer.impl) is LexicoImpl
    layer.process_weights_after_loading(torch.bfloat16)
    assert layer.get_attn_backend() is LexicoBackend.bound_to(layer.impl.setup)
    assert layer.get_attn_backend().get_impl_cls() is LexicoImpl  # vLLM may ask again


@pytest.fixture
def default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_layers_that_wrap_the_backend_are_refused_when_they_are_made(engine_config, default_dtype):
    with pytest.raises(ValueError, match=r"LEXICO cannot serve this: attention is a EncoderOnly\w+Lexico"):
        PrefillPrefixLMAttention(**HEADS, cache_config=engine_config.cache_config, prefix="model.layers.0.attn")


def test_chunked_layers_have_vllms_own_backend(engine_config, default_dtype):
    """Llama 4's were accepted, and attended to all tokens instead of a chunk's."""
    of_engine = {"cache_config": engine_config.cache_config, "prefix": "model.layers.0.attn"}
    layer = ChunkedLocalAttention(**HEADS, attention_chunk_size=64, **of_engine)
    assert layer.get_attn_backend().__name__ == "ChunkedLocalAttention_64_CPUAttentionBackend"
    assert engine_config.attention_config.backend.name == "LEXICO"


def test_layers_with_another_cache_are_refused_when_weights_are_loaded(engine_config, default_dtype):
    layer = RSWAAttention(**HEADS, rswa_window=8, cache_config=engine_config.cache_config, prefix="model.layers.0.attn")
    with pytest.raises(ValueError, match=r"attention of layer model\.layers\.0\.attn is a RSWAAttention, reference"):
        layer.process_weights_after_loading(torch.bfloat16)


def test_a_wrapped_backend_is_refused_whatever_wraps_it():
    for backend in (LexicoBackend, LexicoBackend.bound_to(None)):
        assert backend.get_impl_cls() is LexicoImpl
    wrapped = create_encoder_only_attention_backend(LexicoBackend)
    with pytest.raises(ValueError, match="EncoderOnlyAttention_LexicoBackend, attention in both directions"):
        wrapped.get_impl_cls()
    unknown = subclass_attention_backend("Spiral", LexicoBackend, LexicoBackend.get_builder_cls())
    with pytest.raises(ValueError, match="is a SpiralLexicoBackend, which is not supported"):
        unknown.get_impl_cls()


def test_every_layer_of_this_vllm_has_words():
    """A class that a later vLLM adds is refused without them; then they are missing here."""
    for module in pkgutil.iter_modules(vllms_layers.__path__):
        with contextlib.suppress(ImportError):  # of kernels for a GPU
            importlib.import_module(f"{vllms_layers.__name__}.{module.name}")
    kinds = [kind for kind in Attention.__subclasses__() if kind.__module__.startswith(vllms_layers.__name__)]
    assert len(kinds) >= 6
    for kind in kinds:
        (reason,) = refusals.attention_class_refusals(kind, Attention)
        assert any(described in reason for described in refusals.ATTENTION_CLASSES.values()), reason


def test_a_step_or_a_cache_in_both_directions_is_refused():
    """What vLLM says about the mask is obeyed or refused, whatever the class of the layer."""
    builder = object.__new__(LexicoMetadataBuilder)
    with pytest.raises(ValueError, match="attention in both directions"):
        builder.build(0, SimpleNamespace(causal=False))
    with pytest.raises(ValueError, match="attention in both directions"):
        LexicoMetadataBuilder(SimpleNamespace(non_causal=True), [], None, torch.device("cpu"))
