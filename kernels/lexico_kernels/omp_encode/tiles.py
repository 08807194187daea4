"""omp_encode on CUDA: matching pursuit of tiles of vectors, straight into the code pages.

One program codes a tile of vectors of one part: loads them from the batch or the tail, centres and stretches them,
pursues (`pursuit.py`), quantises and writes the records.
"""

import triton
import triton.language as tl
from torch import Tensor, empty, float32, int32

from lexico_kernels import reference
from lexico_kernels.device.launch import WRITE_EXACT, pursuit_launch
from lexico_kernels.device.records import FP8_PEAK, LEVEL_BITS, float_to_fp8
from lexico_kernels.memory import layout as sizes
from lexico_kernels.memory.pages import LayerCache
from lexico_kernels.omp_encode.pursuit import load_code, pursue_tile, quantize_tile, unit_rows, value_bits_for

MOST_LOST, BF16_MAX = tl.constexpr(sizes.MOST_LOST), tl.constexpr(sizes.BF16_MAX)


@triton.jit
def _load_vectors(
    tokens_ptr,
    stride_t,
    stride_h,
    tail_ptr,
    tail_page_stride,
    source,
    head,
    coded,
    PART,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """[TILE, D_PAD]: rows of this batch where source >= 0, else tail slots -1 - source; 0 where not coded."""
    dims = tl.arange(0, D_PAD)
    row, slot = source.to(tl.int64), (-1 - source).to(tl.int64)
    batch = tokens_ptr + row * stride_t + head * stride_h
    tail = tail_ptr + (slot // R) * tail_page_stride + ((head * R + slot % R) * 2 + PART) * D
    mask = (dims < D)[None, :] & coded[:, None]
    in_batch = mask & (source >= 0)[:, None]
    in_tail = mask & (source < 0)[:, None]
    fresh = tl.load(batch[:, None] + dims[None, :], mask=in_batch, other=0.0)
    stored = tl.load(tail[:, None] + dims[None, :], mask=in_tail, other=0.0)
    return tl.where(in_batch, fresh.to(stored.dtype), stored)


@triton.jit
def _entries(entry, M, source_ptr, destination_ptr, P: tl.constexpr):
    """Source and destination of entries, and which of them are to be coded."""
    destination = tl.load(destination_ptr + entry, mask=entry < M, other=-1)
    coded = destination >= P
    source = tl.load(source_ptr + entry, mask=coded, other=0)
    return source, destination, coded


@triton.jit
def _write_records(
    head_start, slot, coded, chosen, coefficients, levels_ptr, gain_factor, ADDRESS: tl.constexpr, CODEC: tl.constexpr
):
    """Quantise and store the records of a tile, their scales times `gain_factor`; see `reference.encode_vectors`."""
    columns = tl.arange(0, chosen.shape[1])
    level, peak, kept, _ = quantize_tile(chosen, coefficients, levels_ptr)
    mask = coded[:, None] & (columns < ADDRESS.sparsity)[None, :]
    index_ptr = (head_start + ADDRESS.index_offset + slot * ADDRESS.index_stride).to(
        tl.pointer_type(tl.uint16), bitcast=True
    )
    if CODEC == "packed16":
        entry = tl.where(kept, (chosen << LEVEL_BITS) | level, 0)
    else:
        kept = ((peak > 0) & (peak < float("inf")))[:, None] & (chosen > 0)
        entry = tl.where(kept, chosen, 0)
        code = float_to_fp8(tl.where(kept, coefficients / tl.where(peak > 0, peak, 1.0)[:, None] * FP8_PEAK, 0.0))
        code_ptr = head_start + ADDRESS.coefficient_offset + slot * ADDRESS.coefficient_stride
        tl.store(code_ptr[:, None] + columns[None, :], code.to(tl.uint8), mask=mask)
        peak = peak / FP8_PEAK
    tl.store(index_ptr[:, None] + columns[None, :], entry.to(tl.uint16), mask=mask)
    any_kept = tl.max(kept.to(tl.int32), 1) > 0
    scale_ptr = (head_start + ADDRESS.scale_offset + slot * ADDRESS.scale_stride).to(
        tl.pointer_type(tl.bfloat16), bitcast=True
    )
    tl.store(scale_ptr, tl.where(any_kept, tl.minimum(peak * gain_factor, BF16_MAX), 0.0).to(tl.bfloat16), mask=coded)


@triton.jit
def _encode_part(
    tokens_ptr,
    stride_t,
    stride_h,
    tail_ptr,
    tail_page_stride,
    atoms_ptr,
    levels_ptr,
    mean_ptr,
    stretch_ptr,
    fp8_atoms_ptr,
    code_ptr,
    code_page_stride,
    source,
    destination,
    head,
    coded,
    chosen_rows,
    coefficient_rows,
    min_energy,
    value_bits,
    gain,
    PART: tl.constexpr,
    ADDRESS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    CODEC: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Code the K (PART 0) or V (1) vectors of one tile."""
    dims = tl.arange(0, D_PAD)
    raw = _load_vectors(
        tokens_ptr, stride_t, stride_h, tail_ptr, tail_page_stride, source, head, coded, PART, R, D, D_PAD
    )
    x = raw.to(tl.float32) - tl.load(mean_ptr + head * D + dims, mask=dims < D, other=0.0)[None, :]
    x = x / tl.load(stretch_ptr + head * D + dims, mask=dims < D, other=1.0)[None, :]
    x, norm = unit_rows(x)
    residual = pursue_tile(
        x, atoms_ptr, fp8_atoms_ptr, chosen_rows, coefficient_rows, coded, ADDRESS.sparsity, min_energy, value_bits,
        N, D, D_PAD, CHUNK,
    )  # fmt: skip
    chosen, coefficients = load_code(chosen_rows, coefficient_rows, coded, ADDRESS.sparsity, S_PAD)
    head_start = code_ptr + (destination // P) * code_page_stride + head * HEAD_BYTES
    lost = tl.minimum(tl.sum(residual * residual, 1), MOST_LOST)
    gain_factor = tl.exp2(-gain * tl.log2(1 - lost))
    coefficients *= norm[:, None]
    _write_records(head_start, destination % P, coded, chosen, coefficients, levels_ptr, gain_factor, ADDRESS, CODEC)


@triton.jit
def _omp_encode(
    key_ptr,
    key_stride_t,
    key_stride_h,
    value_ptr,
    value_stride_t,
    value_stride_h,
    tail_ptr,
    tail_page_stride,
    key_atoms_ptr,
    key_levels_ptr,
    key_mean_ptr,
    key_stretch_ptr,
    key_fp8_atoms_ptr,
    value_atoms_ptr,
    value_levels_ptr,
    value_mean_ptr,
    value_stretch_ptr,
    value_fp8_atoms_ptr,
    code_ptr,
    code_page_stride,
    source_ptr,
    destination_ptr,
    chosen_ptr,
    coefficient_ptr,
    M,
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
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of a head's K or V; over at once if none of it is to be coded."""
    entry = tl.program_id(0) * TILE + tl.arange(0, TILE)
    source, destination, coded = _entries(entry, M, source_ptr, destination_ptr, P)
    if tl.max(coded.to(tl.int32), 0) == 0:
        return
    scratch = (tl.program_id(1).to(tl.int64) * M + entry) * S_PAD
    chosen_rows, coefficient_rows = chosen_ptr + scratch, coefficient_ptr + scratch
    head = tl.program_id(1) // 2
    if tl.program_id(1) % 2 == 0:
        _encode_part(
            key_ptr, key_stride_t, key_stride_h, tail_ptr, tail_page_stride,
            key_atoms_ptr + head * KEY_STRIDE, key_levels_ptr, key_mean_ptr, key_stretch_ptr,
            key_fp8_atoms_ptr + head * KEY_STRIDE,
            code_ptr, code_page_stride,
            source, destination, head, coded, chosen_rows, coefficient_rows, min_energy, value_bits, key_gain,
            0, KEY, HEAD_BYTES, CODEC, P, R, KEY_N, D, D_PAD, S_PAD, CHUNK,
        )  # fmt: skip
    else:
        _encode_part(
            value_ptr, value_stride_t, value_stride_h, tail_ptr, tail_page_stride,
            value_atoms_ptr + head * VALUE_STRIDE, value_levels_ptr, value_mean_ptr, value_stretch_ptr,
            value_fp8_atoms_ptr + head * VALUE_STRIDE,
            code_ptr, code_page_stride,
            source, destination, head, coded, chosen_rows, coefficient_rows, min_energy, value_bits, value_gain,
            1, VALUE, HEAD_BYTES, CODEC, P, R, VALUE_N, D, D_PAD, S_PAD, CHUNK,
        )  # fmt: skip


@triton.jit
def _write_exact(
    key_ptr,
    key_stride_t,
    key_stride_h,
    value_ptr,
    value_stride_t,
    value_stride_h,
    tail_ptr,
    tail_page_stride,
    code_ptr,
    code_page_stride,
    source_ptr,
    destination_ptr,
    M,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """The "exact" codec: one tile of vectors, K and V, copied as they are."""
    vector = tl.program_id(0) * TILE + tl.arange(0, TILE)
    dims = tl.arange(0, D_PAD)
    source, destination, coded = _entries(vector // HK, M, source_ptr, destination_ptr, P)
    head = vector % HK
    key = _load_vectors(
        key_ptr, key_stride_t, key_stride_h, tail_ptr, tail_page_stride, source, head, coded, 0, R, D, D_PAD
    )
    value = _load_vectors(
        value_ptr, value_stride_t, value_stride_h, tail_ptr, tail_page_stride, source, head, coded, 1, R, D, D_PAD
    )
    head_start = code_ptr + (destination // P) * code_page_stride + head * HEAD_BYTES
    mask = coded[:, None] & (dims < D)[None, :]
    element: tl.constexpr = tl.pointer_type(tail_ptr.dtype.element_ty)
    key_row = (head_start + KEY.index_offset + (destination % P) * KEY.index_stride).to(element, bitcast=True)
    value_row = (head_start + VALUE.index_offset + (destination % P) * VALUE.index_stride).to(element, bitcast=True)
    tl.store(key_row[:, None] + dims[None, :], key, mask=mask)
    tl.store(value_row[:, None] + dims[None, :], value, mask=mask)


def omp_encode(
    key: Tensor, value: Tensor, cache: LayerCache, source: Tensor, destination: Tensor, *, relative_error: float = 0.0
) -> None:
    """Triton version of `reference.omp_encode`."""
    layout, M = cache.layout, source.shape[0]
    if M == 0:
        return
    D, Hk = layout.head_dim, layout.num_kv_heads
    D_PAD = triton.next_power_of_2(D)
    inputs = (
        key, key.stride(0), key.stride(1), value, value.stride(0), value.stride(1),
        cache.tail_pages, cache.tail_pages.stride(0),
    )  # fmt: skip
    outputs = (cache.code_pages, cache.code_pages.stride(0), source, destination)
    sizes = {
        "KEY": layout.address("key"),
        "VALUE": layout.address("value"),
        "HEAD_BYTES": layout.head_bytes,
        "P": layout.block_tokens,
        "R": layout.tail_tokens,
        "D": D,
        "D_PAD": D_PAD,
    }
    if layout.codec == "exact":
        grid = (triton.cdiv(M * Hk, WRITE_EXACT.tile),)
        _write_exact[grid](*inputs, *outputs, M, **sizes, HK=Hk, TILE=WRITE_EXACT.tile, num_warps=WRITE_EXACT.num_warps)
        return
    S_PAD = triton.next_power_of_2(max(layout.key_sparsity, layout.value_sparsity))
    screens = [book.atoms if book.fp8_atoms is None else book.fp8_atoms for book in (cache.key, cache.value)]
    launch = pursuit_launch(2 * M * Hk, D_PAD, max(screen.element_size() for screen in screens))
    scratch = [empty(2 * M * Hk * S_PAD, dtype=dtype, device=key.device) for dtype in (int32, float32)]
    books = (*cache.key.tensors, screens[0], *cache.value.tensors, screens[1])
    _omp_encode[(triton.cdiv(M, launch.tile), 2 * Hk)](
        *inputs,
        *books,
        *outputs,
        *scratch,
        M,
        max(relative_error, reference.MIN_RESIDUAL) ** 2,
        value_bits_for(max(cache.key.num_atoms, cache.value.num_atoms)),
        cache.key.gain,
        cache.value.gain,
        **sizes,
        CODEC=layout.codec,
        KEY_N=cache.key.num_atoms,
        VALUE_N=cache.value.num_atoms,
        KEY_STRIDE=cache.key.head_stride,
        VALUE_STRIDE=cache.value.head_stride,
        S_PAD=S_PAD,
        CHUNK=launch.atoms,
        TILE=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
