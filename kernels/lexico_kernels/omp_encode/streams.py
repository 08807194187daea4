"""omp_encode of many vectors on Hopper: the dictionary streams through shared memory, past 256 vectors at a time.

A launch in Triton (`tiles.py`) waits for its products, then for the search of the largest, and in coordinate descent
for every atom. Here one group of warps searches while tensor cores work for the others, and atoms are on their way
before they are needed; `stream_omp.cu` says how. What it does not support, `tiles.py` codes.
"""

from functools import cache as once

import torch
from torch import Tensor

from lexico_kernels.device import nvrtc
from lexico_kernels.device.launch import STREAM_CAPABILITY, STREAM_DIM, STREAM_SPARSITY, STREAM_VECTORS
from lexico_kernels.memory import records
from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.layout import KV, CodeLayout
from lexico_kernels.memory.pages import LayerCache, LayerStack
from lexico_kernels.omp_encode.encoding import arguments, layers_arguments, record_macros

FILES = ("omp_encode/stream_primitives.cu", records.FILE, "omp_encode/stream_omp.cu")
NAME, LAYERS_NAME = "stream_omp", "stream_omp_layers"
DTYPES = (torch.bfloat16, torch.float16)
TILE, THREADS = 256, 512
STAGES = 4  # chunks of the dictionary in flight
SHARED_BYTES = 232448  # of a block


def supports(key: Tensor, value: Tensor, cache: LayerCache) -> bool:
    """Whether `omp_encode` here can code what a step with these tokens [T, Hk, D] codes, faster than `tiles.py`."""
    vectors = 2 * key.shape[0] * cache.layout.num_kv_heads
    return vectors >= STREAM_VECTORS and supports_tensors(key, value, cache) and _on_device(key.get_device())


def supports_layers(layers: LayerStack) -> bool:
    """Whether `omp_encode_layers` here can code such layers."""
    pages = layers.caches[0].tail_pages  # what one layer has all have
    key, value = pages[:0, :, 0, 0], pages[:0, :, 0, 1]
    return supports_tensors(key, value, layers.caches[0]) and _on_device(pages.get_device())


def supports_tensors(key: Tensor, value: Tensor, cache: LayerCache) -> bool:
    """Whether the kernel is made for such a cache and such tokens, whatever the device."""
    layout, tensors = cache.layout, (key, value, cache.tail_pages)
    if layout.codec != "packed16" or layout.head_dim != STREAM_DIM:
        return False
    if max(layout.key_sparsity, layout.value_sparsity) > STREAM_SPARSITY:
        return False
    if any(book.stream_atoms is None for book in (cache.key, cache.value)):
        return False
    if key.dtype not in DTYPES or any(tensor.dtype != key.dtype for tensor in tensors):
        return False
    # A lane loads 16 bytes of a row at once.
    strides = [stride for tokens in (key, value) for stride in tokens.stride()[:2]] + [cache.tail_pages.stride(0)]
    return (
        key.stride(2) == value.stride(2) == 1
        and all(stride % 8 == 0 for stride in strides)
        and all(tensor.data_ptr() % 16 == 0 for tensor in tensors)
    )


@once
def _on_device(device: int) -> bool:
    return torch.cuda.get_device_capability(device)[0] == STREAM_CAPABILITY and nvrtc.available(device)


@once
def multiprocessors(device: int) -> int:
    """Of a device: blocks that run at once."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def macros(layout: CodeLayout, atoms: tuple[int, int], shared: tuple[bool, bool], half: bool) -> dict[str, int]:
    """The kernel's macros, which `stream_omp.cu` lists.

    Args:
        layout: of the pages, "packed16".
        atoms: N of keys and values.
        shared: whether all heads have one dictionary, of keys and values.
        half: whether tokens are float16, not bfloat16.
    """
    found = record_macros(layout, atoms, half) | {"SHARED_BYTES": SHARED_BYTES, "STAGES": STAGES}
    found |= {f"{kv.upper()}_SHARED": int(one) for kv, one in zip(KV, shared, strict=True)}
    return found | LayerStack.macros()


@once
def _kernel(
    name: str, device: int, layout: CodeLayout, atoms: tuple[int, int], shared: tuple[bool, bool], half: bool
) -> nvrtc.Kernel:
    return nvrtc.kernel(FILES, name, device, SHARED_BYTES, **macros(layout, atoms, shared, half))


def _kernel_for(name: str, cache: LayerCache) -> nvrtc.Kernel:
    books = (cache.key, cache.value)
    atoms, shared = (books[0].num_atoms, books[1].num_atoms), (not books[0].head_stride, not books[1].head_stride)
    return _kernel(
        name, cache.tail_pages.get_device(), cache.layout, atoms, shared, cache.tail_pages.dtype == torch.float16
    )  # fmt: skip


def _tensors(book: Codebook) -> tuple[Tensor, ...]:
    """A codebook as the kernel takes it."""
    assert book.stream_atoms is not None and book.integers is not None and book.lengths is not None
    return book.stream_atoms, book.integers, book.lengths, book.levels, book.mean, book.stretch


def omp_encode(
    key: Tensor, value: Tensor, cache: LayerCache, source: Tensor, destination: Tensor, *, relative_error: float = 0.0
) -> None:
    """CUDA C++ version of `reference.omp_encode`, of what `supports_tensors`."""
    M = source.shape[0]
    if M == 0:
        return
    _kernel_for(NAME, cache).launch(
        (-(-M // TILE), 2 * cache.layout.num_kv_heads, 1),
        THREADS,
        *arguments(
            key, value, cache, (*_tensors(cache.key), *_tensors(cache.value)), source, destination, relative_error
        ),
    )


def omp_encode_layers(
    layers: LayerStack, source: Tensor, destination: Tensor, *, relative_error: float = 0.0, fewer: int = 0
) -> None:
    """CUDA C++ version of `reference.omp_encode_layers`, of what `supports_layers`.

    fewer: up to so many jobs to be coded are left to another launch; where there are no more, this codes nothing.
    """
    cache, M = layers.caches[0], source.shape[0]
    if fewer >= M:
        return
    dictionaries = 2 * cache.layout.num_kv_heads * len(layers.caches)
    blocks = min(dictionaries * -(-M // TILE), multiprocessors(cache.tail_pages.get_device()))
    _kernel_for(LAYERS_NAME, cache).launch(
        (blocks, 1, 1),
        THREADS,
        *layers_arguments(layers, source, destination, fewer, relative_error),
    )
