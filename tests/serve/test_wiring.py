"""Each name of vLLM that LEXICO relies on, renamed throughout vLLM: the start fails with a sentence that names it."""

import dataclasses
import functools
import sys
import types
from types import FunctionType, SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")
import vllm.v1.core.sched.scheduler
import vllm.v1.worker.gpu.block_table
import vllm.v1.worker.gpu.model_runner
from lexico_kernels import CodeLayout
from vllm.model_executor.layers.attention import Attention
from vllm.v1.core import kv_cache_coordinator, kv_cache_manager, single_type_kv_cache_manager
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_lexico import compat
from vllm_lexico.compat.elsewhere import ELSEWHERE
from vllm_lexico.serve import wiring
from vllm_lexico.serve.backend import LexicoBackend
from vllm_lexico.serve.impl import LexicoImpl
from vllm_lexico.serve.metadata import LexicoMetadataBuilder, LexicoTailMetadataBuilder
from vllm_lexico.serve.tail_pages import LexicoTailManager, LexicoTailSpec
from vllm_lexico.serve.wiring import Wire, allocation, check, dry_run, failures, layers, pages

OURS = LexicoImpl, LexicoMetadataBuilder, LexicoTailMetadataBuilder, LexicoTailManager
ROWS = layers.ROWS + pages.ROWS
NAMES = [(row, name) for row in ROWS if isinstance(row, Wire) for name in row.names.split()]
CORE = kv_cache_coordinator, kv_cache_manager, single_type_kv_cache_manager


@pytest.fixture(autouse=True)
def fresh():
    """A process in which nothing has been checked yet, and LEXICO is registered."""
    import vllm_lexico

    vllm_lexico.register()
    pages._checked.clear()
    layers.check_layers.cache_clear()
    wiring._set_by_methods.cache_clear()


def start():
    """What a layer does before it is anything else."""
    layers.check_layers(*OURS)
    pages.check_pages(LexicoTailManager, LexicoTailSpec)


def rename(monkeypatch, owner, name):
    """Give a class's attribute, field or what its methods set another name, there and in its bases."""
    new = f"{name}_renamed"
    for base in owner.__mro__[:-1]:
        if name in vars(base):
            value = vars(base)[name]
            monkeypatch.delattr(base, name)
            monkeypatch.setattr(base, new, value, raising=False)
        if name in (fields := getattr(base, "__dataclass_fields__", {})):
            monkeypatch.delitem(fields, name)
        for function in [one for one in vars(base).values() if isinstance(one, FunctionType)]:
            rename_use(monkeypatch, function, name, new)


def rename_use(monkeypatch, function, name, new):
    """Let a function of vLLM use another name; those of torch stay as they are."""
    code = function.__code__
    if name in code.co_names and function.__module__.startswith("vllm."):
        names = tuple(new if one == name else one for one in code.co_names)
        monkeypatch.setattr(function, "__code__", code.replace(co_names=names))


def rename_in_core(monkeypatch, name):
    """Rename a method of the cache managers wherever the scheduler's part of vLLM has it or calls it."""
    for module in CORE:
        for owner in [one for one in vars(module).values() if isinstance(one, type) and one.__module__ in sys.modules]:
            if owner.__module__.startswith("vllm.v1.core"):
                for function in [one for one in vars(owner).values() if isinstance(one, FunctionType)]:
                    rename_use(monkeypatch, function, name, f"{name}_renamed")
                if name in vars(owner) and "Manager" in owner.__name__ and owner.__name__ != "KVCacheManager":
                    monkeypatch.setattr(owner, f"{name}_renamed", vars(owner)[name], raising=False)


def test_this_vllm_is_what_is_relied_on():
    assert list(failures(ROWS, *OURS)) == []
    start()


@pytest.mark.parametrize(("row", "name"), NAMES, ids=[f"{row.owner.__name__}.{name}" for row, name in NAMES])
def test_a_renamed_name_stops_the_start(monkeypatch, row, name):
    rename(monkeypatch, row.owner, name)
    with pytest.raises(ValueError, match=r"LEXICO does not fit vLLM .* tested with this version") as error:
        check([row], *OURS)
    assert f"{row.owner.__name__}.{name} is gone, so {row.breaks}" in str(error.value)


OVERRIDDEN = [
    *("get_num_blocks_to_allocate", "allocate_new_blocks", "add_local_computed_blocks", "remove_skipped_blocks"),
    *("cache_blocks", "new_step_starts", "find_longest_cache_hit", "reachable_block_mask", "pop_blocks_for_free"),
]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_dry_run_sees_a_method_that_is_no_longer_called(monkeypatch, name):
    """The old name may stay as a relic, so that nothing but what happens to pages tells."""
    rename_in_core(monkeypatch, name)
    assert list(failures(pages.ROWS, *OURS)) in ([], [f for f in failures(pages.ROWS, *OURS) if name in f])
    with pytest.raises(ValueError, match="LEXICO does not fit vLLM") as error:
        pages.check_pages(LexicoTailManager, LexicoTailSpec)
    assert name in str(error.value), error.value


def test_the_dry_run_sees_the_base_manager(monkeypatch):
    monkeypatch.setattr(KVCacheSpecRegistry, "get_manager_class", classmethod(lambda *_: SlidingWindowManager))
    with pytest.raises(ValueError, match="get_manager_class gives SlidingWindowManager for the tail's pages"):
        pages.check_pages(LexicoTailManager, LexicoTailSpec)


def test_the_dry_run_sees_pages_that_are_known_before_they_are_computed(monkeypatch):
    original = kv_cache_coordinator.KVCacheCoordinator.cache_blocks
    monkeypatch.setattr(
        kv_cache_coordinator.KVCacheCoordinator,
        "cache_blocks",
        lambda self, request, end: original(self, request, 256 if request.request_id == "writer" else end),
    )
    with pytest.raises(ValueError, match="cache_blocks makes tokens known that no step has computed"):
        pages.check_pages(LexicoTailManager, LexicoTailSpec)


def test_other_arguments_are_seen(monkeypatch):
    def remove_skipped_blocks(self, request_id, new_argument, processed_computed_tokens): ...

    monkeypatch.setattr(SlidingWindowManager, "remove_skipped_blocks", remove_skipped_blocks)
    with pytest.raises(ValueError, match=r"SlidingWindowManager\.remove_skipped_blocks takes other arguments"):
        start()


def other_index(layer_name, num_attn_module=1):
    return int(layer_name.split(".")[-3]) - 5


def other_order(output, prefix_lse, prefix_output, suffix_output, suffix_lse, output_lse=None): ...


@pytest.mark.parametrize(
    ("place", "name", "value", "named"),
    [
        (layers, "extract_layer_index", other_index, "extract_layer_index"),
        (layers, "merge_attn_states", other_order, "merge_attn_states"),
        (
            layers.backend.AttentionBackend,
            "forward_includes_kv_cache_update",
            False,
            "forward_includes_kv_cache_update",
        ),
        (vllm.v1.core.sched.scheduler.Scheduler, "schedule", lambda self: None, "new_step_starts"),
    ],
)
def test_another_behaviour_stops_the_start(monkeypatch, place, name, value, named):
    monkeypatch.setattr(place, name, value)
    with pytest.raises(ValueError, match=named):
        start()


@pytest.mark.parametrize(
    ("version", "advice"),
    [("0.33.1", "with this version, which something has changed"), ("0.41.0", "vLLM 0.32 and 0.33: install one")],
)
def test_the_advice_is_for_the_version_that_is_there(monkeypatch, version, advice):
    monkeypatch.setattr("vllm.__version__", version)
    sentence = str(compat.does_not_fit("Some.name is gone, so pages would be lost"))
    assert f"LEXICO does not fit vLLM {version}: Some.name is gone, so pages would be lost. It was tested" in sentence
    assert advice in sentence and sentence.endswith(", or choose another --attention-backend")


def traced(function):
    """A function as a tracer or a profiler wraps it."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


def test_functions_that_a_tracer_wraps_are_read_as_they_are_written(monkeypatch):
    classes = {vllm.v1.core.sched.scheduler.Scheduler, vllm.v1.worker.gpu.block_table.BlockTables}
    classes |= {row.owner for row in ROWS if isinstance(row, Wire)}
    for owner in classes:
        for name, value in list(vars(owner).items()):
            if isinstance(value, FunctionType) and not name.startswith("__"):
                monkeypatch.setattr(owner, name, traced(value))
    start()


def test_a_name_that_pickles_by_value_stops_the_start(monkeypatch):
    monkeypatch.delattr(layers.AttentionBackendEnum["LEXICO"], "__reduce_ex__")
    with pytest.raises(ValueError, match="AttentionBackendEnum member does not pickle"):
        start()


def test_a_platform_that_chooses_otherwise_stops_the_start(monkeypatch):
    if not layers.current_platform.is_cpu():
        pytest.skip("this vLLM is not for CPUs")
    chooser = layers.selector._cached_get_attn_backend.__wrapped__
    rename_use(monkeypatch, chooser, "get_attn_backend_cls", "get_backend")
    with pytest.raises(ValueError, match=r"CpuPlatform\.get_attn_backend_cls is not the function that chooses"):
        start()


class Masking:
    """Block tables that null what lies below a window."""

    def __init__(self, sliding_window_reach): ...


@pytest.mark.parametrize("asked", ["num_retained_tokens", "tokens_to_retain"])
def test_tables_that_are_masked_by_another_name_stop_the_start(monkeypatch, asked):
    runner = type("GPUModelRunner", (), {"start": eval(f"lambda self, spec: spec.{asked}")})
    monkeypatch.setattr(vllm.v1.worker.gpu.block_table, "BlockTables", Masking)
    monkeypatch.setattr(vllm.v1.worker.gpu.model_runner, "GPUModelRunner", runner)
    monkeypatch.setattr(SlidingWindowSpec, asked, property(lambda self: 5), raising=False)
    found = [one for one in failures(pages.ROWS, *OURS) if "num_retained_tokens" in one]
    assert bool(found) == (asked != "num_retained_tokens")


LAYOUT = CodeLayout(64, 2, 15, 15)
CODES = FullAttentionSpec(
    block_size=128, num_kv_heads=2, head_size=64, dtype=torch.bfloat16, state_content_bytes=LAYOUT.cell_bytes
)
TAIL = LexicoTailSpec(
    block_size=LAYOUT.tail_tokens,
    num_kv_heads=2,
    head_size=64,
    dtype=torch.bfloat16,
    sliding_window=129,
    sink_blocks=1,
    hit_margin_tokens=0,
    concurrent_batches=1,
)


def test_a_codes_group_whose_spec_was_not_customized_is_refused():
    allocation.check_codes_group(CODES, LAYOUT, 128)
    with pytest.raises(ValueError, match="customize_spec"):
        allocation.check_codes_group(dataclasses.replace(CODES, state_content_bytes=None), LAYOUT, 128)
    with pytest.raises(ValueError, match="256 tokens"):
        larger = CodeLayout(64, 2, 15, 15, block_tokens=256)
        allocation.check_codes_group(dataclasses.replace(CODES, block_size=256), larger, 128)


def test_a_tail_group_of_another_kind_or_size_is_refused():
    allocation.check_tail_group(TAIL, TAIL)
    with pytest.raises(ValueError, match="outside of their pages"):
        allocation.check_tail_group(dataclasses.replace(TAIL, block_size=128), TAIL)
    with pytest.raises(ValueError, match="got a FullAttentionSpec"):
        allocation.check_tail_group(CODES, TAIL)


def test_a_layer_that_keeps_its_backend_is_refused():
    layer = SimpleNamespace(get_attn_backend=lambda: LexicoBackend)
    allocation.check_backend_taken(layer, "a", LexicoBackend)
    with pytest.raises(ValueError, match=r"Attention\.get_attn_backend"):
        allocation.check_backend_taken(layer, "a", Attention)


def test_two_layers_of_one_index_are_refused():
    allocation.check_layer_index(1, "b", {0: "a", None: "c"})
    allocation.check_layer_index(1, "b", {0: "a", 1: "b"})  # weights loaded again
    with pytest.raises(ValueError, match="layers a and b both have index 0"):
        allocation.check_layer_index(0, "b", {0: "a"})


def test_scattered_pages_are_refused():
    allocation.check_dense(torch.zeros(5, 2, 128, 64)[::2])
    allocation.check_dense(torch.zeros(5, 128, 2, 64).transpose(1, 2))
    with pytest.raises(ValueError, match="supported_kv_cache_layouts"):
        allocation.check_dense(torch.zeros(2, 5, 128, 64).transpose(0, 1))


def test_what_is_missing_at_import_is_a_sentence(monkeypatch):
    import vllm_lexico.serve as door

    assert door.LexicoBackend is LexicoBackend
    monkeypatch.setitem(sys.modules, "vllm_lexico.serve.backend", types.ModuleType("empty"))
    with pytest.raises(ValueError, match=r"does not fit vLLM .*importing .* ImportError: cannot import name"):
        _ = door.LexicoBackend


def test_the_self_test_is_cheap_and_done_once(monkeypatch):
    calls = []
    monkeypatch.setattr(dry_run, "rehearse", lambda *ours: calls.append(ours))
    start()
    start()
    assert calls == [(LexicoTailManager, LexicoTailSpec)]


@pytest.mark.parametrize("listed", ELSEWHERE, ids=[one.where for one in ELSEWHERE])
def test_workarounds_are_where_compat_says(listed):
    import importlib

    module, _, path = listed.where.partition(":")
    place = importlib.import_module(module)
    for part in path.split("."):
        place = getattr(place, part)
    assert listed.why and listed.until and listed.upstream.startswith(("https://github.com/", ""))
