"""The order of entries in "packed16" records, for kernels that read them by lookup: `entry_order.cu` says why.

A record means the same in every order. Spans of 32 tokens that a step completes are ordered together, since which order
is fast depends on the neighbours; spans that are never completed keep the order in which atoms were chosen.
"""

from functools import cache as once

from torch import Tensor

from lexico_kernels.device import nvrtc
from lexico_kernels.memory import records
from lexico_kernels.memory.pages import LayerCache, LayerStack
from lexico_kernels.sparse_decode import lookup
from lexico_kernels.sparse_decode.lookup_sizes import divide_up, power_of_two, way_for

FILES, NAME = (records.FILE, "omp_encode/entry_order.cu"), "order_entries"
LANES = 32  # of a warp, and jobs that a block goes through
BANKS = 32


def supports(cache: LayerCache) -> bool:
    """Whether such records gain by an order, and this device can give it to them."""
    return cache.layout.codec == "packed16" and nvrtc.available(cache.code_pages.get_device())


def sets(cache: LayerCache, limit_bytes: int) -> dict[str, int]:
    """Which lanes meet when `attend_codes` reads the cache: SET and SHIFT of keys and values for the kernel.

    Args:
        cache: a layer's.
        limit_bytes: shared memory that a block may have, by which query heads are dealt out to passes.
    """
    way = way_for(cache.group, cache.key.num_atoms, cache.value.num_atoms, limit_bytes)
    queries = 1 if way is None else divide_up(cache.group, way.passes)
    row_words = max(1, power_of_two(queries) // 2)  # of a key's atom, halves of all queries
    return {"KEY_SET": BANKS // row_words, "KEY_SHIFT": int(queries == 1), "VALUE_SET": BANKS, "VALUE_SHIFT": 0}


def macros(cache: LayerCache, limit_bytes: int) -> dict[str, int]:
    """The kernel's macros, which `entry_order.cu` lists."""
    return records.macros(cache.layout) | LayerStack.macros() | sets(cache, limit_bytes)


@once
def _kernel(device: int, **macros: int) -> nvrtc.Kernel:
    return nvrtc.kernel(FILES, NAME, device, **macros)


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
    device = pages.get_device()
    kernel = _kernel(device, **macros(cache, lookup.shared_limit_bytes(device)))
    kernel.launch(grid, LANES, pages, addresses, nvrtc.Int64(pages.stride(0)), destination, M)
