"""omp_encode of all layers in one launch: a step of decode codes few tokens, so few that a layer's would not fill the
device. `omp.py` has the parts; what varies with the layer comes from a table of addresses.
"""

import triton
import triton.language as tl
from torch import Tensor, empty, float32, int32

from lexico_kernels import reference
from lexico_kernels.device.launch import LAYERS, fitting_atoms
from lexico_kernels.memory.pages import LayerStack
from lexico_kernels.omp_encode import tiles as omp
from lexico_kernels.omp_encode.pursuit import value_bits_for
from lexico_kernels.omp_encode.tiles import _encode_part, _entries

COLUMNS = tl.constexpr(len(LayerStack.COLUMNS))


@triton.jit
def _place(first_ptr, addresses_ptr, layer, column):
    """A layer's tensor of a column of the table, given the first layer's, from which it is a multiple of 16 bytes away.

    Not the address as it is in the table: the compiler must see that it is aligned, to copy 16 bytes at once.
    """
    away = tl.load(addresses_ptr + layer * COLUMNS + column) - tl.load(addresses_ptr + column)
    element_bytes: tl.constexpr = first_ptr.dtype.element_ty.primitive_bitwidth // 8
    return first_ptr + tl.multiple_of(away // element_bytes, 16 // element_bytes)


@triton.jit
def _omp_encode_layers(
    addresses_ptr,
    tail_ptr,
    code_ptr,
    key_atoms_ptr,
    key_levels_ptr,
    key_mean_ptr,
    key_stretch_ptr,
    value_atoms_ptr,
    value_levels_ptr,
    value_mean_ptr,
    value_stretch_ptr,
    tail_page_stride,
    code_page_stride,
    source_ptr,
    destination_ptr,
    chosen_ptr,
    coefficient_ptr,
    M,
    fewer,
    min_energy,
    value_bits,
    key_gain,
    value_gain,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    CODEC: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    KEY_N: tl.constexpr,
    VALUE_N: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    VALUE_STRIDE: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Some tiles of one layer's and head's K or V, until one has nothing to be coded; pointers are the first layer's.

    Codes nothing where the list has no entry number `fewer` to be coded: then `cluster.py` does.
    """
    if tl.load(destination_ptr + fewer) < P:
        return
    layer, head, part = tl.program_id(1) // (2 * HK), tl.program_id(1) % (2 * HK) // 2, tl.program_id(1) % 2
    rows = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * TILE + tl.arange(0, TILE)
    chosen_rows, coefficient_rows = chosen_ptr + rows * S_PAD, coefficient_ptr + rows * S_PAD
    tail_ptr = _place(tail_ptr, addresses_ptr, layer, 0)
    code_ptr = _place(code_ptr, addresses_ptr, layer, 1)
    start = tl.program_id(0) * TILE
    while start < M:
        source, destination, coded = _entries(start + tl.arange(0, TILE), M, source_ptr, destination_ptr, P)
        start += tl.num_programs(0) * TILE
        if tl.max(coded.to(tl.int32), 0) == 0:
            start = M
        elif part == 0:
            _encode_part(
                tail_ptr, 0, 0, tail_ptr, tail_page_stride,
                _place(key_atoms_ptr, addresses_ptr, layer, 2) + head * KEY_STRIDE,
                _place(key_levels_ptr, addresses_ptr, layer, 3),
                _place(key_mean_ptr, addresses_ptr, layer, 4),
                _place(key_stretch_ptr, addresses_ptr, layer, 5),
                # Few vectors gain nothing by a screen: they are chosen by the atoms.
                _place(key_atoms_ptr, addresses_ptr, layer, 2) + head * KEY_STRIDE,
                code_ptr, code_page_stride,
                source, destination, head, coded, chosen_rows, coefficient_rows, min_energy, value_bits, key_gain,
                0, KEY, HEAD_BYTES, CODEC, P, R, KEY_N, D, D_PAD, S_PAD, CHUNK,
            )  # fmt: skip
        else:
            _encode_part(
                tail_ptr, 0, 0, tail_ptr, tail_page_stride,
                _place(value_atoms_ptr, addresses_ptr, layer, 6) + head * VALUE_STRIDE,
                _place(value_levels_ptr, addresses_ptr, layer, 7),
                _place(value_mean_ptr, addresses_ptr, layer, 8),
                _place(value_stretch_ptr, addresses_ptr, layer, 9),
                # Few vectors gain nothing by a screen: they are chosen by the atoms.
                _place(value_atoms_ptr, addresses_ptr, layer, 6) + head * VALUE_STRIDE,
                code_ptr, code_page_stride,
                source, destination, head, coded, chosen_rows, coefficient_rows, min_energy, value_bits, value_gain,
                1, VALUE, HEAD_BYTES, CODEC, P, R, VALUE_N, D, D_PAD, S_PAD, CHUNK,
            )  # fmt: skip
        tl.debug_barrier()  # the next tile takes the same scratch


def omp_encode_layers(
    layers: LayerStack, source: Tensor, destination: Tensor, *, relative_error: float = 0.0, fewer: int = 0
) -> None:
    """Triton version of `reference.omp_encode_layers`. fewer: entries that are left to another launch."""
    cache, M = layers.caches[0], source.shape[0]
    layout = cache.layout
    if fewer >= M:
        return
    if layout.codec == "exact":
        for each in layers.caches:
            nothing = each.tail_pages.new_empty(0, layout.num_kv_heads, layout.head_dim)
            omp.omp_encode(nothing, nothing, each, source, destination)
        return
    Hk, D_PAD = layout.num_kv_heads, triton.next_power_of_2(layout.head_dim)
    S_PAD = triton.next_power_of_2(max(layout.key_sparsity, layout.value_sparsity))
    grid = (min(LAYERS.tiles, triton.cdiv(M, LAYERS.tile)), 2 * Hk * len(layers.caches))
    scratch = [empty(grid[0] * grid[1] * LAYERS.tile * S_PAD, dtype=dtype, device=source.device)
               for dtype in (int32, float32)]  # fmt: skip
    _omp_encode_layers[grid](
        layers.addresses,
        cache.tail_pages,
        cache.code_pages,
        *cache.key.tensors,
        *cache.value.tensors,
        cache.tail_pages.stride(0),
        cache.code_pages.stride(0),
        source,
        destination,
        *scratch,
        M,
        fewer,
        max(relative_error, reference.MIN_RESIDUAL) ** 2,
        value_bits_for(max(cache.key.num_atoms, cache.value.num_atoms)),
        cache.key.gain,
        cache.value.gain,
        KEY=layout.address("key"),
        VALUE=layout.address("value"),
        HEAD_BYTES=layout.head_bytes,
        CODEC=layout.codec,
        P=layout.block_tokens,
        R=layout.tail_tokens,
        KEY_N=cache.key.num_atoms,
        VALUE_N=cache.value.num_atoms,
        KEY_STRIDE=cache.key.head_stride,
        VALUE_STRIDE=cache.value.head_stride,
        HK=Hk,
        D=layout.head_dim,
        D_PAD=D_PAD,
        S_PAD=S_PAD,
        CHUNK=fitting_atoms(LAYERS.atoms, D_PAD, cache.key.atoms.element_size()),
        TILE=LAYERS.tile,
        num_warps=LAYERS.num_warps,
        num_stages=LAYERS.num_stages,
    )
