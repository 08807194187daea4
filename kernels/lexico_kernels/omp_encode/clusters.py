"""omp_encode of few vectors on CUDA devices with thread block clusters: the whole dictionary stays on chip.

A launch in Triton (`tiles.py`) streams the dictionary from L2 in every pass of every tile, and a pass of few vectors
takes as long as one of thousands. Here each block of a cluster holds a piece of the dictionary and every vector meets
all of them; `cluster_omp.cu` says how. What it does not support, `tiles.py` codes.
"""

from functools import cache as once

import torch
from torch import Tensor

from lexico_kernels.device import nvrtc
from lexico_kernels.device.launch import CLUSTER, CLUSTER_BLOCKS, CLUSTER_VECTORS, LAYERS
from lexico_kernels.memory import records
from lexico_kernels.memory.layout import KV, MAX_ATOMS, CodeLayout
from lexico_kernels.memory.pages import LayerCache, LayerStack
from lexico_kernels.omp_encode.encoding import arguments, layers_arguments, record_macros

FILES = (
    "omp_encode/cluster_primitives.cu",
    records.FILE,
    "omp_encode/cluster_omp.cu",
    "omp_encode/cluster_launch.cu",
)
NAME, LAYERS_NAME = "cluster_omp", "cluster_omp_layers"
MIN_CAPABILITY = (9, 0)
DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
WARPS = 16  # of a block
THREADS = 32 * WARPS
BLOCK_ATOMS = 512  # in the registers of a block; so a cluster has at most eight, and more would not be portable
WINDOW = 4 * THREADS  # jobs looked through at a time
UNIT = 32  # vectors that are correlated at a time
DEALT = 8  # vectors that a cluster gets at a time, as many as one product has columns


def supports(key: Tensor, value: Tensor, cache: LayerCache) -> bool:
    """Whether `omp_encode` here can code what a step with these tokens [T, Hk, D] codes, faster than `tiles.py`.

    A step codes as many tokens as it has, on average: each once. The length of a launch's list says less, since in
    decode nearly all of it is skipped.
    """
    vectors = 2 * key.shape[0] * cache.layout.num_kv_heads
    return vectors <= CLUSTER_VECTORS and supports_tensors(key, value, cache) and _on_device(key.get_device())


def supports_layers(layers: LayerStack) -> bool:
    """Whether `omp_encode_layers` here can code such layers."""
    pages = layers.caches[0].tail_pages  # what one layer has all have
    key, value = pages[:0, :, 0, 0], pages[:0, :, 0, 1]
    return supports_tensors(key, value, layers.caches[0]) and _on_device(pages.get_device())


def supports_tensors(key: Tensor, value: Tensor, cache: LayerCache) -> bool:
    """Whether the kernel is made for such a cache and such tokens, whatever the device."""
    tensors = (key, value, cache.tail_pages, cache.key.atoms, cache.value.atoms)
    if cache.layout.codec != "packed16" or cache.layout.head_dim not in HEAD_DIMS:
        return False
    if key.dtype not in DTYPES or any(tensor.dtype != key.dtype for tensor in tensors):
        return False
    # A lane loads 8 bytes of a row of 128 numbers at once, and 16 of an atom.
    strides = [stride for tokens in (key, value) for stride in tokens.stride()[:2]] + [cache.tail_pages.stride(0)]
    return (
        key.stride(2) == value.stride(2) == 1
        and all(stride % 4 == 0 for stride in strides)
        and all(tensor.data_ptr() % 16 == 0 for tensor in tensors[3:])
        and all(tensor.data_ptr() % 8 == 0 for tensor in tensors[:3])
    )


@once
def _on_device(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= MIN_CAPABILITY and nvrtc.available(device)


def cluster_blocks(atoms: int) -> int:
    """Blocks of a cluster that hold so many atoms."""
    return -(-atoms // BLOCK_ATOMS)


def macros(layout: CodeLayout, atoms: tuple[int, int], strides: tuple[int, int], half: bool) -> dict[str, int]:
    """The kernel's macros, which `cluster_omp.cu` lists.

    Args:
        layout: of the pages, "packed16".
        atoms: N of keys and values.
        strides: numbers from one head's atoms to the next one's, of keys and values.
        half: whether atoms and tokens are float16, not bfloat16.
    """
    sparsity = max(layout.key_sparsity, layout.value_sparsity)
    blocks = cluster_blocks(max(atoms))
    owned = next(row.owned for row in CLUSTER if sparsity <= row.max_sparsity)
    found = record_macros(layout, atoms, half) | {
        "D": layout.head_dim,
        "CLUSTER": blocks,
        "OWNED": owned,
        "SHARED_BYTES": shared_bytes(layout.head_dim, blocks, owned, sparsity),
        "WARPS": WARPS,
        "BLOCK_ATOMS": BLOCK_ATOMS,
        "WINDOW": WINDOW,
        "UNIT": UNIT,
        "DEALT": DEALT,
        "MAX_ATOMS": MAX_ATOMS,
    }
    found |= {f"{kv.upper()}_STRIDE": stride for kv, stride in zip(KV, strides, strict=True)}
    return found | LayerStack.macros()


def shared_bytes(head_dim: int, blocks: int, owned: int, sparsity: int) -> int:
    """Shared memory of a block; the kernel asserts that it counts the same."""
    row_bytes, padded = 2 * head_dim, 16 if sparsity <= 16 else 32
    rows = blocks * owned + 2 * owned + owned * sparsity + padded - sparsity
    words = owned * (blocks * WARPS + head_dim + sparsity * (padded + 1) + 64 + 2) + 32 + 4 * WARPS
    arrivals = owned + -(-blocks * owned // UNIT)
    unaligned = rows * row_bytes + 4 * words + 8 * arrivals + 2 * WINDOW
    return -(-unaligned // 16) * 16


@once
def _kernel(
    name: str, device: int, layout: CodeLayout, atoms: tuple[int, int], strides: tuple[int, int], half: bool
) -> nvrtc.Kernel:
    defined = macros(layout, atoms, strides, half)
    return nvrtc.kernel(FILES, name, device, defined["SHARED_BYTES"], **defined)


def _kernel_for(name: str, cache: LayerCache) -> nvrtc.Kernel:
    pages, books = cache.tail_pages, (cache.key, cache.value)
    atoms, strides = (books[0].num_atoms, books[1].num_atoms), (books[0].head_stride, books[1].head_stride)
    return _kernel(name, pages.get_device(), cache.layout, atoms, strides, pages.dtype == torch.float16)


def omp_encode(
    key: Tensor, value: Tensor, cache: LayerCache, source: Tensor, destination: Tensor, *, relative_error: float = 0.0
) -> None:
    """CUDA C++ version of `reference.omp_encode`, of what `supports_tensors`."""
    layout, M = cache.layout, source.shape[0]
    if M == 0:
        return
    books = (cache.key, cache.value)
    rows, blocks = 2 * layout.num_kv_heads, cluster_blocks(max(book.num_atoms for book in books))
    clusters = max(1, min(CLUSTER_BLOCKS // (rows * blocks), -(-M // DEALT)))
    _kernel_for(NAME, cache).launch(
        (clusters * blocks, rows, 1),
        THREADS,
        *arguments(key, value, cache, (*cache.key.tensors, *cache.value.tensors), source, destination, relative_error),
    )


def omp_encode_layers(
    layers: LayerStack, source: Tensor, destination: Tensor, *, relative_error: float = 0.0, most: int = WINDOW
) -> None:
    """CUDA C++ version of `reference.omp_encode_layers`, of what `supports_layers`.

    most: jobs to be coded, up to WINDOW; where there are more, this codes nothing.
    """
    cache, M = layers.caches[0], source.shape[0]
    assert most <= WINDOW, most
    if M == 0:
        return
    blocks = cluster_blocks(max(cache.key.num_atoms, cache.value.num_atoms))
    dictionaries = 2 * cache.layout.num_kv_heads * len(layers.caches)
    clusters = max(1, min(LAYERS.cluster_blocks // blocks, dictionaries))
    _kernel_for(LAYERS_NAME, cache).launch(
        (clusters * blocks, 1, 1),
        THREADS,
        *layers_arguments(layers, source, destination, most, relative_error),
    )
