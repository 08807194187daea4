"""The order of entries in "packed16" records, for whoever reads them through tables: `entry_order.cu` says why.

A record means the same in every order. Groups of 32 tokens that a step completes are ordered together, since which
order is fast depends on the neighbours; groups that are never completed keep the order in which atoms were chosen.
"""

from functools import cache as once

from torch import Tensor

from lexico_kernels.device import nvrtc
from lexico_kernels.memory.layout import KV, SPAN_TOKENS, CodeLayout
from lexico_kernels.memory.pages import LayerCache, LayerStack

FILES, NAME = ("omp_encode/entry_order.cu",), "order_entries"
THREADS = 128


def takes(cache: LayerCache) -> bool:
    """Whether an order helps such records, on this device."""
    return fits(cache.layout) and nvrtc.available(cache.code_pages.get_device())


def fits(layout: CodeLayout) -> bool:
    """Whether records have entries in any order, and pages whole groups."""
    return layout.codec == "packed16" and layout.block_tokens % SPAN_TOKENS == 0


def defines(layout: CodeLayout) -> dict[str, int]:
    """The kernel's macros."""
    columns = LayerStack.COLUMNS
    macros = {"P": layout.block_tokens, "HEAD_BYTES": layout.head_bytes}
    macros |= {"COLUMNS": len(columns), "CODE_COLUMN": columns.index("code_pages")}
    for part in KV:
        address = layout.address(part)
        fields = {"SPARSITY": address.sparsity, "OFFSET": address.index_offset, "STRIDE": address.index_stride}
        macros |= {f"{part.upper()}_{name}": number for name, number in fields.items()}
    return macros


@once
def _kernel(device: int, layout: CodeLayout) -> nvrtc.Kernel:
    return nvrtc.kernel(FILES, NAME, device, **defines(layout))


def order_entries(cache: LayerCache, destination: Tensor) -> None:
    """Order the records of every group whose last token is among the destinations int64 [M] of `omp_encode`."""
    _launch(cache, nvrtc.Int64(0), 1, destination)


def order_entries_layers(layers: LayerStack, destination: Tensor) -> None:
    """The same of `omp_encode_layers`."""
    _launch(layers.caches[0], layers.addresses, len(layers.caches), destination)


def _launch(cache: LayerCache, addresses: Tensor | nvrtc.Int64, layers: int, destination: Tensor) -> None:
    M = destination.shape[0]
    if M == 0:
        return
    pages, grid = cache.code_pages, (-(-M // 32), cache.layout.num_kv_heads, 2 * layers)
    kernel = _kernel(pages.get_device(), cache.layout)
    kernel.launch(grid, THREADS, pages, addresses, nvrtc.Int64(pages.stride(0)), destination, M)
