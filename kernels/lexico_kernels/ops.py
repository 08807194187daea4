"""The public operations: kernels in Triton or CUDA C++ on CUDA tensors, torch twins elsewhere and for study codecs.

Kernels are imported when a CUDA tensor first asks for them, so that machines without Triton can use the rest. What the
arguments mean is said in `reference.py`, which has the same names and signatures.
"""

from torch import Tensor, cuda

from lexico_kernels import reference
from lexico_kernels.device.launch import (
    DECODE_SPLITS,
    FP8_CAPABILITY,
    LAYERS,
    STREAM_CAPABILITY,
    STREAM_DIM,
    STREAM_SPARSITY,
    fp8_fits,
)
from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.layout import KERNEL_CODECS, CodeLayout
from lexico_kernels.memory.pages import LayerCache, LayerStack, RequestTables
from lexico_kernels.sparse_decode.lookup_sizes import scratch_bytes


def with_fast_atoms(book: Codebook, sparsity: int) -> Codebook:
    """The same with copies of the atoms (see `Codebook`) by which `omp_encode` is faster on its device, if any do."""
    device, size = book.atoms.device, book.atoms.shape[2]
    if device.type != "cuda" or not fp8_fits(size, sparsity):
        return book
    capability = cuda.get_device_capability(device)
    if capability < FP8_CAPABILITY:
        return book
    book = book.with_fp8_atoms()
    fits = size == STREAM_DIM and sparsity <= STREAM_SPARSITY and capability[0] == STREAM_CAPABILITY
    return book.with_stream_atoms() if fits else book


def on_cuda(tensor: Tensor) -> bool:
    """Whether kernels can have it."""
    return tensor.is_cuda


def _has_kernels(cache: LayerCache) -> bool:
    """Whether kernels code and read these pages."""
    return on_cuda(cache.code_pages) and cache.layout.codec in KERNEL_CODECS


def write_tail(key: Tensor, value: Tensor, cache: LayerCache, tail_slot_mapping: Tensor) -> None:
    """Store raw tokens in the tail pages; see `reference.write_tail`."""
    if on_cuda(key):
        from lexico_kernels import write_tail as kernel

        kernel.write_tail(key, value, cache, tail_slot_mapping)
    else:
        reference.write_tail(key, value, cache, tail_slot_mapping)


def omp_encode(
    key: Tensor, value: Tensor, cache: LayerCache, source: Tensor, destination: Tensor, *, relative_error: float = 0.0
) -> None:
    """Code tokens of this batch or of the tail into the code pages; see `reference.omp_encode`."""
    if not _has_kernels(cache):
        reference.omp_encode(key, value, cache, source, destination, relative_error=relative_error)
        return
    from lexico_kernels.omp_encode import clusters, entry_order, streams, tiles

    encode = next((way.omp_encode for way in (clusters, streams) if way.supports(key, value, cache)), tiles.omp_encode)
    encode(key, value, cache, source, destination, relative_error=relative_error)
    if entry_order.supports(cache):
        entry_order.order_entries(cache, destination)


def omp_encode_layers(layers: LayerStack, source: Tensor, destination: Tensor, *, relative_error: float = 0.0) -> None:
    """Code the same tokens of all layers' tails into their code pages; see `reference.omp_encode_layers`."""
    if not _has_kernels(layers.caches[0]):
        reference.omp_encode_layers(layers, source, destination, relative_error=relative_error)
        return
    from lexico_kernels.omp_encode import all_layers, clusters, entry_order, streams

    # The count of tokens to code is known on the device only, so both ways are launched, and one returns at once.
    fewer = 0
    if clusters.supports_layers(layers):
        fewer = LAYERS.cluster_tokens
        clusters.omp_encode_layers(layers, source, destination, relative_error=relative_error, most=fewer)
    encode = streams.omp_encode_layers if streams.supports_layers(layers) else all_layers.omp_encode_layers
    encode(layers, source, destination, relative_error=relative_error, fewer=fewer)
    if entry_order.supports(layers.caches[0]):
        entry_order.order_entries_layers(layers, destination)


def sparse_decode(
    query: Tensor,
    cache: LayerCache,
    tables: RequestTables,
    token_request: Tensor,
    token_seq_len: Tensor,
    *,
    scale: float,
    out: Tensor | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of single tokens over coded and raw history, with its log-sum-exp; see `reference.sparse_decode`."""
    decode = reference.sparse_decode
    if _has_kernels(cache):
        from lexico_kernels.sparse_decode import lookup, portable

        decode = lookup.sparse_decode if lookup.supports(query, cache, tables) else portable.sparse_decode
    step = query, cache, tables, token_request, token_seq_len
    return decode(*step, scale=scale, out=out, soft_cap=soft_cap, sinks=sinks)


def reconstruct(
    cache: LayerCache,
    tables: RequestTables,
    token_request: Tensor,
    token_position: Tensor,
    out_key: Tensor,
    out_value: Tensor,
) -> None:
    """Write tokens of any requests as dense K and V; see `reference.reconstruct`."""
    if _has_kernels(cache):
        from lexico_kernels import reconstruct as kernel

        kernel.reconstruct(cache, tables, token_request, token_position, out_key, out_value)
    else:
        reference.reconstruct(cache, tables, token_request, token_position, out_key, out_value)


def decode_scratch_bytes(layout: CodeLayout, num_tokens: int, num_heads: int, max_tokens: int) -> int:
    """Most memory that `sparse_decode` on CUDA allocates besides its results, for reserving it.

    Args:
        layout: of the pages.
        num_tokens: T.
        num_heads: Hq.
        max_tokens: what a row of the block table can hold.

    Returns:
        Bytes.
    """
    portable = 4 * num_tokens * num_heads * DECODE_SPLITS * (layout.head_dim + 1)
    return max(portable, scratch_bytes(layout, num_heads, num_tokens, max_tokens))


def pursue(
    vectors: Tensor, atoms: Tensor, sparsity: int, levels: Tensor | None = None, *, relative_error: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of many vectors over several dictionaries; see `reference.pursue`."""
    if not vectors.is_cuda:
        return reference.pursue(vectors, atoms, sparsity, levels, relative_error=relative_error)
    from lexico_kernels.omp_encode import pursuit

    return pursuit.pursue(vectors, atoms, sparsity, levels, relative_error=relative_error)
