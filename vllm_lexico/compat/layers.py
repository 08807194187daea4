"""Workarounds for layers that vLLM owns and LEXICO does not code: their backend, and the pages that they ask for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from vllm_lexico import NAME


def let_vllm_keep_its_layers() -> None:
    """Apply what has to be in place before a model's layers are built and its pages are planned."""
    let_chunked_layers_choose()
    keep_block_of_states()


def let_chunked_layers_choose() -> None:
    """Let layers that attend within chunks have the backend that vLLM chooses without LEXICO.

    Why: `ChunkedLocalAttention` asks for the engine's backend as any layer does and wraps it for its own kind of
    attention, and `backend_per_kind` has no word for it. How: the function by which it asks is wrapped, and answers as
    if no backend were named where that is LEXICO. Can go when `backend_per_kind` knows chunked layers.
    """
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention import chunked_local_attention

    original = chunked_local_attention.get_attn_backend
    if getattr(original, "lexico", False):
        return

    @functools.wraps(original)
    def get_attn_backend(*args: Any, **kwargs: Any) -> Any:
        attention = get_current_vllm_config().attention_config
        named = attention.backend
        if getattr(named, "name", None) != NAME:
            return original(*args, **kwargs)
        attention.backend = None
        try:
            return original(*args, **kwargs)
        finally:
            attention.backend = named

    get_attn_backend.lexico = True  # type: ignore[attr-defined]
    chunked_local_attention.get_attn_backend = get_attn_backend


def state_bytes(vllm_config: Any) -> int:
    """Ask a hybrid model's class for the bytes of a layer's state on a rank, before its layers are built.

    Why: vLLM sizes blocks when the layers are there, in its workers, and hands the size to nobody who could still
    choose a layout for it. How: the same methods of the class that `Platform._align_hybrid_block_size` calls. Can go
    when a backend may say how its pages share a block with states (vllm-project/vllm#42082).
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.v1.kv_cache_interface import MambaSpec

    model = vllm_config.model_config
    kind, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    if hasattr(kind, "get_mamba_specs_from_config"):
        return max(spec.page_size_bytes for spec in kind.get_mamba_specs_from_config(vllm_config))
    shapes, dtypes = kind.get_mamba_state_shape_from_config, kind.get_mamba_state_dtype_from_config
    return MambaSpec(shapes=shapes(vllm_config), dtypes=dtypes(vllm_config), block_size=-1).page_size_bytes


def change_cache_spec(layer: Any, change: Callable[[Any, Any], Any]) -> None:
    """Have a layer that is vLLM's own ask for other pages; calling it again changes nothing.

    Why: layers that LEXICO does not code share the pool of code pages, whose bytes vLLM does not know when it sizes
    theirs. How: the layer's `get_kv_cache_spec` is wrapped and hands what it made, and the configuration, to `change`.
    Can go when vLLM lets a backend size the pages of its neighbours (vllm-project/vllm#42082).
    """
    original = layer.get_kv_cache_spec
    if getattr(original, "lexico", False):
        return

    @functools.wraps(original)
    def get_kv_cache_spec(vllm_config: Any) -> Any:
        return change(original(vllm_config), vllm_config)

    get_kv_cache_spec.lexico = True  # type: ignore[attr-defined]
    layer.get_kv_cache_spec = get_kv_cache_spec


def let_cpu_read_blocks(layer: Any) -> None:
    """Have a layer of the CPU's own backend take pages that lie beside those of other layers in a block.

    Why: that backend names one layout alone, with the layers outermost, though its kernels find pages by their stride.
    How: the layer gets a subclass of its backend that names the layout with the same pages and blocks outermost. Can go
    when `CPUAttentionBackend` names it.
    """
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_layout import KVCacheLayout

    backend = layer.get_attn_backend()
    if not current_platform.is_cpu() or backend.supported_kv_cache_layouts() != (KVCacheLayout.LBHNC,):
        return
    own = {"__module__": backend.__module__, "__qualname__": backend.__qualname__}
    layouts = classmethod(lambda cls: (KVCacheLayout.BLHNC,))
    layer.attn_backend = type(backend.__name__, (backend,), own | {"supported_kv_cache_layouts": layouts})


def keep_block_of_states() -> None:
    """Let the scheduler end chunks where states are kept, at the ends of blocks of codes.

    Why: once pages are planned vLLM sets the block size to the smallest of all groups, and the scheduler of a hybrid
    model takes that for the tokens between two states; the tail's pages are smaller. How: `validate_block_size`, which
    is called next, puts back the block of states where there is a tail. Can go when the scheduler asks the states'
    own spec (it does in mamba_hybrid.py).
    """
    from vllm.config import VllmConfig

    from vllm_lexico import compat

    original = VllmConfig.validate_block_size
    if getattr(original, "lexico", False):
        return

    @functools.wraps(original)
    def validate_block_size(self: Any) -> None:
        cache, model = self.cache_config, self.model_config
        hybrid = model is not None and model.is_hybrid and compat.serves_lexico(self)
        if hybrid and cache.mamba_cache_mode == "align":
            cache.block_size = cache.mamba_block_size
        original(self)

    validate_block_size.lexico = True  # type: ignore[attr-defined]
    VllmConfig.validate_block_size = validate_block_size


def without_states_inside(spec: Any) -> Any:
    """A spec of Mamba2's states on a CPU with which chunks end where a state is kept.

    Why: vLLM 0.32 has Mamba2 keep a state inside of a chunk, which its kernels for CPUs do not give back, and ends with
    an IndexError. How: the spec says that the layer keeps none there, as that of linear attention does. Can go when
    `mamba_chunk_scan_combined_varlen` for CPUs follows `return_intermediate_states`.
    """
    return dataclasses.replace(spec, num_prefill_checkpoint_blocks=0) if spec.num_prefill_checkpoint_blocks else spec


def prepare_kernels_of_states(vllm_config: Any, layers: dict[str, Any]) -> None:
    """Let layers of Mamba have the kernels that advance their states.

    Why: vLLM prepares them when it finds a group of such layers, and does not look into a group that has a spec for
    each layer, as groups have where the block is outermost. How: the same function is called with plain groups before
    vLLM calls it. Can go when `initialize_mamba_ssu_backend` looks into groups (vLLM 0.33 does not).

    Args:
        vllm_config: of the engine.
        layers: vLLM's `static_forward_context`.
    """
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.ops.ssu_dispatch import initialize_mamba_ssu_backend
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    states = {name: layer for name, layer in layers.items() if isinstance(layer, MambaBase)}
    groups = [KVCacheGroupSpec([name], layer.get_kv_cache_spec(vllm_config)) for name, layer in states.items()]
    more = {"use_replayssm": True} if getattr(vllm_config.cache_config, "use_replayssm", False) else {}
    initialize_mamba_ssu_backend(vllm_config.mamba_config, KVCacheConfig(0, [], groups), **more)


def max_requests(vllm_config: Any, specs: dict[str, Any], num_blocks: int) -> float:
    """Requests of the longest length that a cache holds, as vLLM counts them when it plans one.

    Why: the count is made in the engine's process and logged there, and a worker is told blocks alone. How: vLLM's own
    planning is asked again, in whichever module it is. Can go when `CacheConfig` brings the count to workers.

    Args:
        vllm_config: of the engine.
        specs: cache spec of each layer, by name.
        num_blocks: of the pool.
    """
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import KVCacheConfig

    groups = plan_groups(vllm_config, specs)
    return kv_cache_utils.get_max_concurrency_for_kv_cache_config(vllm_config, KVCacheConfig(num_blocks, [], groups))


def plan_groups(vllm_config: Any, specs: dict[str, Any]) -> list[Any]:
    """The cache groups that vLLM makes of layers with these specs, by name."""
    try:
        from vllm.v1.core.kv_cache_planning import get_kv_cache_groups  # 0.33
    except ImportError:
        from vllm.v1.core.kv_cache_utils import get_kv_cache_groups
    return get_kv_cache_groups(vllm_config, specs)
