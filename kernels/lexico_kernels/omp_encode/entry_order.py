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

FILES, NAME = (records.FILE, "omp_encode/entry_order.cu"), "order_entries"
THREADS = 128
LANES = 32  # jobs that a block goes through


def supports(cache: LayerCache) -> bool:
    """Whether such records gain by an order, and this device can give it to them."""
    return cache.layout.codec == "packed16" and nvrtc.available(cache.code_pages.get_device())


def macros(layout: CodeLayout) -> dict[str, int]:
    """The kernel's macros, which `entry_order.cu` lists."""
    return records.macros(layout) | {"THREADS": THREADS} | LayerStack.macros()


@once
def _kernel(device: int, layout: CodeLayout) -> nvrtc.Kernel:
    return nvrtc.kernel(FILES, NAME, device, **macros(layout))


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
    kernel = _kernel(pages.get_device(), cache.layout)
    kernel.launch(grid, THREADS, pages, addresses, nvrtc.Int64(pages.stride(0)), destination, M)
