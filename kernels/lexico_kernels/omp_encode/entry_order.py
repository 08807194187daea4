"""The order of entries in "packed16" records, for kernels that read them by lookup: `entry_order.cu` says why.

A record means the same in every order. Spans of 32 tokens that a step completes are ordered together, since which order
is fast depends on the neighbours; spans that are never completed keep the order in which atoms were chosen.
"""

from functools import cache as once

from torch import Tensor

from lexico_kernels.device import nvrtc
from lexico_kernels.memory import records
from lexico_kernels.memory.layout import CodeLayout
from lexico_kernels.memory.pages import LayerCache, LayerStack
from lexico_kernels.sparse_decode import lookup
from lexico_kernels.sparse_decode.lookup_sizes import divide_up, power_of_two, way_for

FILES, NAME = (records.FILE, "omp_encode/entry_order.cu"), "order_entries"
LANES = 32  # of a warp, and jobs that a block goes through
BANKS = 32


def supports(cache: LayerCache) -> bool:
    """Whether such records gain by an order, and this device can give it to them."""
    return cache.layout.codec == "packed16" and nvrtc.available(cache.code_pages.get_device())


def key_sets(group: int, key_atoms: int, value_atoms: int, limit_bytes: int) -> dict[str, int]:
    """Which lanes meet when `attend_codes` looks keys up: KEY_SET and KEY_SHIFT for the kernel.

    Args:
        group: query heads per KV head.
        key_atoms, value_atoms: N of both dictionaries.
        limit_bytes: shared memory that a block may have, by which query heads are dealt out to passes.
    """
    way = way_for(group, key_atoms, value_atoms, limit_bytes)
    queries = 1 if way is None else divide_up(group, way.passes)
    row_words = max(1, power_of_two(queries) // 2)  # of a key's atom, halves of all queries
    return {"KEY_SET": BANKS // row_words, "KEY_SHIFT": int(queries == 1)}


@once
def kernel_for(layout: CodeLayout, group: int, key_atoms: int, value_atoms: int, device: int) -> nvrtc.Kernel:
    """`order_entries`, compiled for such layers; its macros are those that `entry_order.cu` lists."""
    meet = key_sets(group, key_atoms, value_atoms, lookup.shared_limit_bytes(device))
    return nvrtc.kernel(FILES, NAME, device, **records.macros(layout), **LayerStack.macros(), **meet)


def order_entries(cache: LayerCache, destination: Tensor) -> None:
    """Order the records of every span whose last token is among the destinations int64 [M] of `omp_encode`."""
    _launch(cache, nvrtc.Int64(0), 1, destination)


def order_entries_layers(layers: LayerStack, destination: Tensor) -> None:
    """The same of `omp_encode_layers`."""
    _launch(layers.caches[0], layers.addresses, len(layers.caches), destination)


def _launch(cache: LayerCache, addresses: Tensor | nvrtc.Int64, layers: int, destination: Tensor) -> None:
    M = destination.shape[0]
    if M == 0:
        return
    pages, grid = cache.code_pages, (-(-M // LANES), cache.layout.num_kv_heads, 2 * layers)
    kernel = kernel_for(cache.layout, cache.group, cache.key.num_atoms, cache.value.num_atoms, pages.get_device())
    kernel.launch(grid, LANES, pages, addresses, nvrtc.Int64(pages.stride(0)), destination, M)
