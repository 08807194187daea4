"""What vLLM has made of LEXICO's layers and pages, looked at once it has: what no name of a class shows beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vllm_lexico import compat

if TYPE_CHECKING:
    from lexico_kernels import CodeLayout


def check_codes_group(spec: Any, layout: CodeLayout, block_tokens: int) -> None:
    """Refuse a codes group whose pages are not those of its codes.

    Args:
        spec: the group's cache spec.
        layout: of the codes that are to go there.
        block_tokens: of the engine's configuration.

    Raises:
        ValueError: `customize_spec` was not asked, or the blocks were made larger since.
    """
    given = spec.block_size, spec.page_size_bytes
    if given != (block_tokens, layout.page_bytes):
        raise compat.does_not_fit(
            f"a page of codes has {given[0]} tokens in {given[1]} bytes instead of {block_tokens} in "
            f"{layout.page_bytes} (AttentionBackend.customize_spec), so tokens would be written outside of their pages"
        )


def check_tail_group(spec: Any, wanted: Any) -> None:
    """Refuse a tail group that is not as its shadow layers asked for.

    Args:
        spec: the group's cache spec.
        wanted: what a shadow layer's `get_kv_cache_spec` says.

    Raises:
        ValueError: vLLM gave them another kind of pages, or larger blocks.
    """
    fields = ("block_size", "page_size_bytes", "sliding_window", "sink_blocks")
    given = {field: getattr(spec, field, None) for field in fields}
    asked = {field: getattr(wanted, field) for field in fields}
    if type(spec) is not type(wanted) or given != asked:
        raise compat.does_not_fit(
            f"the full-precision tokens got a {type(spec).__name__} with {given} instead of a {type(wanted).__name__} "
            f"with {asked} (AttentionLayerBase.get_kv_cache_spec), so they would be written outside of their pages"
        )


def check_backend_taken(layer: Any, name: str, backend: type) -> None:
    """Refuse a layer that does not give the backend that it was given, whose `customize_spec` knows the layout."""
    if layer.get_attn_backend() is not backend:
        raise compat.does_not_fit(
            f"layer {name} keeps {layer.get_attn_backend().__name__} when its attn_backend is set "
            "(Attention.get_attn_backend), so its pages would be raw ones"
        )


def check_layer_index(index: int, name: str, names_by_index: Mapping[int | None, str]) -> None:
    """Refuse an index that another layer has, whose dictionary this one would get.

    Args:
        index: of the layer.
        name: of the layer.
        names_by_index: layers that have an index already.
    """
    other = names_by_index.get(index, name)
    if other != name:
        raise compat.does_not_fit(
            f"layers {other} and {name} both have index {index} (extract_layer_index), so one would be coded with the "
            "dictionary of the other"
        )


def check_dense(pages: Tensor) -> None:
    """Refuse pages that are not one run of bytes each.

    Args:
        pages: [num_pages, ...], a layer's view as vLLM gives it.
    """
    axes = sorted(zip(pages.stride()[1:], pages.shape[1:], strict=True))
    run = 1
    for stride, size in axes:
        if size > 1 and stride != run:
            raise compat.does_not_fit(
                f"a page of shape {list(pages.shape[1:])} has strides {list(pages.stride()[1:])} "
                "(AttentionBackend.supported_kv_cache_layouts), so codes would be written over other layers' pages"
            )
        run *= size
