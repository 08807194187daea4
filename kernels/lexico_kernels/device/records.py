"""Device functions that several kernels share: find, load and decode records and raw tokens.

ADDRESS is a `layout.RecordAddress` and CODEC a codec's name; both are compile-time constants. `heads` are uint8
pointers to the start of one head in the code page of each token of a tile, `slots` the tokens' offsets in their
pages.
"""

import triton
import triton.language as tl

from lexico_kernels import reference
from lexico_kernels.device import launch
from lexico_kernels.memory import layout

LEVEL_BITS = tl.constexpr(layout.LEVEL_BITS)
NUM_LEVELS = tl.constexpr(layout.NUM_LEVELS)
FP8_PEAK = tl.constexpr(reference.FP8_PEAK)
UNROLL = tl.constexpr(launch.GATHER_UNROLL)


@triton.jit
def page_start(pages_ptr, page_stride, table_ptr, ordinal, valid):
    """Pointers to the pages numbered table[ordinal]; page 0 where not valid. Page offsets can exceed 32 bits."""
    page = tl.load(table_ptr + ordinal, mask=valid, other=0).to(tl.int64)
    return pages_ptr + page * page_stride


@triton.jit
def load_raw(
    tail_ptr,
    page_stride,
    table_ptr,
    positions,
    valid,
    head,
    PART,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """Raw K (PART 0) or V (1) of a tile of positions: [TILE, D_PAD], 0 where not valid."""
    dims = tl.arange(0, D_PAD)
    pages = page_start(tail_ptr, page_stride, table_ptr, positions // R, valid)
    rows = pages + ((head * R + positions % R) * 2 + PART) * D
    return tl.load(rows[:, None] + dims[None, :], mask=valid[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def load_atoms(atoms_ptr, indices, D: tl.constexpr, D_PAD: tl.constexpr):
    """float32 [TILE, D_PAD]: one atom a row."""
    dims = tl.arange(0, D_PAD)
    rows = atoms_ptr + indices[:, None] * D + dims[None, :]
    return tl.load(rows, mask=(dims < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def fp8_to_float(code):
    """float32 of e4m3 bits (no NaN): with its exponent moved it is a float16 256 times too small, subnormals too."""
    half = ((code & 0x7F) << 7).to(tl.uint16).to(tl.float16, bitcast=True)
    magnitude = half.to(tl.float32) * 256.0
    return tl.where((code & 0x80) != 0, -magnitude, magnitude)


@triton.jit
def float_to_fp8(x):
    """e4m3 bits of float32 |x| < 448, rounded to the nearest; works on devices without fp8 instructions."""
    magnitude = tl.abs(x)
    exponent = tl.maximum((magnitude.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    steps = magnitude * ((130 - exponent) << 23).to(tl.float32, bitcast=True)  # in units of 2^(exponent - 3)
    rounded = ((steps + 12582912.0) - 12582912.0).to(tl.int32)  # 1.5 * 2^23 leaves no bits for a fraction
    code = (exponent + 6) * 8 + rounded  # a carry out of the mantissa lands in the exponent by itself
    return tl.where(x < 0, code | 0x80, code)


@triton.jit
def decode_tile(
    heads,
    slots,
    valid,
    atoms_ptr,
    levels_ptr,
    ADDRESS: tl.constexpr,
    CODEC: tl.constexpr,
    DTYPE: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    """float32 [TILE, D_PAD]: the vectors of a tile of records without their head's mean; 0 where not valid.

    DTYPE is that of "exact" vectors.
    """
    index_ptr = heads + ADDRESS.index_offset + slots * ADDRESS.index_stride
    if CODEC == "exact":
        dims = tl.arange(0, D_PAD)
        rows = index_ptr.to(tl.pointer_type(DTYPE), bitcast=True)
        mask = valid[:, None] & (dims < D)[None, :]
        vectors = tl.load(rows[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        scale_ptr = (heads + ADDRESS.scale_offset + slots * ADDRESS.scale_stride).to(
            tl.pointer_type(tl.bfloat16), bitcast=True
        )
        scale = tl.load(scale_ptr, mask=valid, other=0.0).to(tl.float32)
        entry_ptr = index_ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
        vectors = tl.zeros([heads.shape[0], D_PAD], tl.float32)
        SPARSITY: tl.constexpr = ADDRESS.sparsity
        for s in tl.range(SPARSITY, loop_unroll_factor=UNROLL):
            entry = tl.load(entry_ptr + s, mask=valid, other=0).to(tl.int32)
            if CODEC == "packed16":
                index = entry >> LEVEL_BITS
                coefficient = tl.load(levels_ptr + (entry & (NUM_LEVELS - 1)))
            else:
                index = entry
                code = tl.load(
                    heads + ADDRESS.coefficient_offset + slots * ADDRESS.coefficient_stride + s, mask=valid, other=0
                )
                coefficient = fp8_to_float(code.to(tl.int32))
            index = tl.minimum(index, N - 1)  # whatever the bytes are, stay within the dictionary
            vectors += (coefficient * scale)[:, None] * load_atoms(atoms_ptr, index, D, D_PAD)
    return vectors
