"""What the CUDA C++ versions of omp_encode have in common: macros of the records they write, and their arguments."""

from torch import Tensor

from lexico_kernels import reference
from lexico_kernels.device import nvrtc
from lexico_kernels.memory import records
from lexico_kernels.memory.layout import BF16_MAX, MOST_LOST, CodeLayout
from lexico_kernels.memory.pages import LayerCache, LayerStack


def record_macros(layout: CodeLayout, atoms: tuple[int, int], half: bool) -> dict[str, int]:
    """Macros of the tokens that are coded and of the records that are written, which the kernels and `records.cu` list.

    Args:
        layout: of the pages, "packed16".
        atoms: N of keys and values.
        half: whether tokens are float16, not bfloat16.
    """
    return records.macros(layout) | {
        "HALF": int(half),
        "MAX_S": max(layout.key_sparsity, layout.value_sparsity),
        "R": layout.tail_tokens,
        "MOST_LOST_BITS": nvrtc.float_bits(MOST_LOST),
        "BF16_MAX_BITS": nvrtc.float_bits(BF16_MAX),
        "KEY_ATOMS": atoms[0],
        "VALUE_ATOMS": atoms[1],
    }


def arguments(
    key: Tensor,
    value: Tensor,
    cache: LayerCache,
    books: tuple[Tensor, ...],
    source: Tensor,
    destination: Tensor,
    relative_error: float,
) -> tuple[Tensor | int | float, ...]:
    """A launch's arguments, of `reference.omp_encode`'s. books: the tensors of keys' codebook, then of values'."""
    return (
        key,
        *map(nvrtc.Int64, key.stride()[:2]),
        value,
        *map(nvrtc.Int64, value.stride()[:2]),
        cache.tail_pages,
        nvrtc.Int64(cache.tail_pages.stride(0)),
        *books,
        cache.code_pages,
        nvrtc.Int64(cache.code_pages.stride(0)),
        source,
        destination,
        source.shape[0],
        max(relative_error, reference.MIN_RESIDUAL) ** 2,
        float(cache.key.gain),
        float(cache.value.gain),
    )


def layers_arguments(
    layers: LayerStack, source: Tensor, destination: Tensor, limit: int, relative_error: float
) -> tuple[Tensor | int | float, ...]:
    """A launch's arguments, of `reference.omp_encode_layers`'s. limit: jobs, by which launches share the work."""
    cache = layers.caches[0]
    heads = cache.layout.num_kv_heads
    return (
        layers.addresses,
        2 * heads * len(layers.caches),
        heads,
        nvrtc.Int64(cache.tail_pages.stride(0)),
        nvrtc.Int64(cache.code_pages.stride(0)),
        source,
        destination,
        source.shape[0],
        limit,
        max(relative_error, reference.MIN_RESIDUAL) ** 2,
        float(cache.key.gain),
        float(cache.value.gain),
    )
