"""Layers of models that draft: the backend and the pages that they get, and the blocks that they share with codes."""

import sys
import types

import pytest
import torch

pytest.importorskip("vllm")
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, MambaSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_lexico.compat import drafts as compat_drafts
from vllm_lexico.compat import layers as compat_layers
from vllm_lexico.config import LexicoConfig
from vllm_lexico.serve import draft_layers, start_line
from vllm_lexico.serve.backend import LexicoBackend
from vllm_lexico.serve.metadata import BLOCK_LAYOUTS, PAGE_LAYOUTS
from vllm_lexico.serve.setup import LexicoSetup
from vllm_lexico.serve.tail_layer import LexicoTail
from vllm_lexico.serve.tail_pages import TAIL_SUFFIX, tail_spec

HEADS = {"num_kv_heads": 8, "head_size": 128, "dtype": torch.bfloat16}
LEXICO = types.SimpleNamespace(name="LEXICO")


def a_setup(codec="packed16"):
    config = LexicoConfig.from_additional_config({"lexico": {"codec": codec}})
    return LexicoSetup(config, None, num_draft_tokens=3, concurrent_batches=2, lookahead_tokens=3)


def a_tail(codec="packed16", block_tokens=128):
    coded = types.SimpleNamespace(num_kv_heads=8, head_size=128, kv_cache_torch_dtype=torch.bfloat16)
    tail = LexicoTail(coded, a_setup(codec), None)
    tail.block_tokens = block_tokens
    return tail


def a_layer(name="SOME_ATTN", blocks=(), **more):
    def supported(spec=None):
        return list(blocks) or [MultipleOf(16)]

    backend = types.SimpleNamespace(get_name=lambda: name, get_supported_kernel_block_sizes=supported)
    return types.SimpleNamespace(get_attn_backend=lambda: backend, **more)


@pytest.mark.parametrize(("heads", "size", "padded"), [(8, 128, False), (4, 64, False), (2, 64, True)])
def test_a_page_of_drafts_has_the_tokens_of_a_code_page_and_other_bytes(heads, size, padded):
    """vLLM has put a smaller block into the configuration by then."""
    spec = FullAttentionSpec(num_kv_heads=heads, head_size=size, dtype=torch.bfloat16, block_size=16)
    kept = draft_layers.raw("drafts", a_layer(), a_tail(), spec, None)
    token = heads * size * 2 * 2
    assert kept.block_size == 128 and kept.page_size_bytes == 128 * token + (token if padded else 0)
    assert kept.page_size_bytes != a_tail().layout(None).page_bytes


def test_what_cannot_share_blocks_is_refused():
    spec, tail = FullAttentionSpec(**HEADS, block_size=128), a_tail()
    with pytest.raises(ValueError, match=r"FLASHINFER.*pages of 128 tokens whole; name another.*FLASH_ATTN"):
        draft_layers.raw("drafts", a_layer("FLASHINFER", (16, 32, 64)), tail, spec, None)
    state = MambaSpec(shapes=((4, 4),), dtypes=(torch.float32,), block_size=64)
    with pytest.raises(ValueError, match="layer drafts keeps a MambaSpec"):
        draft_layers.raw("drafts", a_layer(), tail, state, None)
    assert draft_layers.raw("drafts", a_layer(), tail, None, None) is None


def planned(specs, layout):
    """The layers of each cache group, as vLLM plans them."""
    config = types.SimpleNamespace(
        cache_config=types.SimpleNamespace(get_resolved_kv_cache_layout=lambda: layout),
        speculative_config=None,
        attention_config=types.SimpleNamespace(hisparse_config=None),
        scheduler_config=types.SimpleNamespace(disable_hybrid_kv_cache_manager=False),
    )
    return [set(group.layer_names) for group in compat_layers.plan_groups(config, specs)]


@pytest.mark.parametrize("codec", ["packed16", "exact"])
@pytest.mark.parametrize("num_drafts", [1, 2, 32])
def test_drafts_and_codes_are_one_group(codec, num_drafts):
    """As vLLM plans pages, with windows of the model beside: a block of the pool has all pages of codes and drafts."""
    tail, names = a_tail(codec), [f"layers.{index}.attn" for index in range(32)]
    layout = tail.layout(None)
    codes = FullAttentionSpec(**HEADS, block_size=128)
    specs = {name: LexicoBackend.bound_to(tail.setup).customize_spec(codes) for name in names}
    specs |= {f"{name}{TAIL_SUFFIX}": tail_spec(tail.setup, layout, torch.bfloat16) for name in names}
    specs |= {
        f"draft.{index}": draft_layers.raw("draft", a_layer(), tail, FullAttentionSpec(**HEADS, block_size=128), None)
        for index in range(num_drafts)
    }
    window = SlidingWindowSpec(**HEADS, block_size=layout.tail_tokens, sliding_window=1000, page_size_padded=None)
    specs |= {f"window.{index}": window for index in range(32)}
    groups = planned(specs, BLOCK_LAYOUTS[0])
    assert {*names, *(f"draft.{index}" for index in range(num_drafts))} in groups
    assert {f"{name}{TAIL_SUFFIX}" for name in names} in groups and len(groups) == 3


def test_pages_of_the_bytes_of_a_code_page_would_leave_a_group_to_each_layer():
    """Why blocks are outermost: otherwise pages have equal bytes, and groups as many layers as the drafts."""
    tail, names = a_tail(), [f"layers.{index}.attn" for index in range(32)]
    layout = tail.layout(None)
    codes = LexicoBackend.bound_to(tail.setup).customize_spec(FullAttentionSpec(**HEADS, block_size=128))
    drafts = FullAttentionSpec(**HEADS, block_size=layout.tail_tokens)
    assert drafts.page_size_bytes == layout.page_bytes
    specs = dict.fromkeys(names, codes) | {"draft.0": drafts}
    specs |= {f"{name}{TAIL_SUFFIX}": tail_spec(tail.setup, layout, torch.bfloat16) for name in names}
    assert len(planned(specs, PAGE_LAYOUTS[0])) == 2 * 32 + 1


def test_pages_of_all_layers_lie_together_where_a_model_drafts():
    assert LexicoBackend.bound_to(a_setup()).supported_kv_cache_layouts() == BLOCK_LAYOUTS
    assert KVCacheLayout.LBHNC in LexicoBackend.bound_to(None).supported_kv_cache_layouts()


@pytest.fixture
def loader(monkeypatch):
    """A class that loads drafts into an engine's layers, one layer after another, and notes which backend is named."""

    class Loader:
        adds = ("draft.0", "draft.1")

        def __init__(self, vllm_config):
            self.vllm_config, self.seen = vllm_config, []

        def load_model(self, target_model):
            attention = self.vllm_config.attention_config
            for name in self.adds:
                self.seen.append((attention.backend, attention.backend_per_kind))
                self.vllm_config.compilation_config.static_forward_context[name] = target_model
            if target_model is None:
                raise RuntimeError("no model")
            return self

    module, name = compat_drafts.LOADERS[0]
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: Loader}))
    monkeypatch.delitem(sys.modules, compat_drafts.LOADERS[1][0], raising=False)
    return Loader


def an_engine(backend=LEXICO, drafts_backend=None):
    other = types.SimpleNamespace(name="FLASH_ATTN")
    per_kind = {"sliding_window": other, "full_attention": LEXICO} if backend is LEXICO else {}
    return types.SimpleNamespace(
        attention_config=types.SimpleNamespace(backend=backend, backend_per_kind=per_kind),
        speculative_config=types.SimpleNamespace(attention_backend=drafts_backend),
        compilation_config=types.SimpleNamespace(static_forward_context={"layers.0": object()}),
    )


@pytest.mark.parametrize("named", [None, types.SimpleNamespace(name="TRITON_ATTN")])
def test_drafts_are_built_with_a_backend_of_their_own(loader, named):
    told = []
    for _ in range(2):  # harmless when called for every layer
        compat_drafts.let_drafts_choose(lambda config, names: told.append((config, names)))
    engine = an_engine(drafts_backend=named)
    before = engine.attention_config.backend, engine.attention_config.backend_per_kind
    assert loader(engine).load_model("model").seen == [(named, {"sliding_window": before[1]["sliding_window"]})] * 2
    assert told == [(engine, ["draft.0", "draft.1"])]
    with pytest.raises(RuntimeError, match="no model"):
        loader(engine).load_model(None)
    assert (engine.attention_config.backend, engine.attention_config.backend_per_kind) == before


def test_other_engines_load_drafts_as_ever(loader):
    told = []
    compat_drafts.let_drafts_choose(lambda config, names: told.append(names))
    other = types.SimpleNamespace(name="FLASH_ATTN")
    assert loader(an_engine(backend=other)).load_model("model").seen == [(other, {})] * 2 and told == []


def test_a_vllm_that_loads_drafts_in_another_way_is_refused(monkeypatch):
    for module, _ in compat_drafts.LOADERS:
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace())
    with pytest.raises(ValueError, match=r"does not fit vLLM.*nothing loads drafts"):
        compat_drafts.let_drafts_choose(lambda config, names: None)


def test_the_line_at_start_counts_drafts():
    layout = a_tail("exact").layout(None)
    line = start_line.describe_start(a_setup("exact"), layout, 2, 5000, draft_bytes=1024)
    assert f"{2 * 4096 + 1024:,} bytes per token instead of {2 * 4096 + 1024:,}" in line
    assert "1,024 of them raw for drafts, newest 131 and" in line
