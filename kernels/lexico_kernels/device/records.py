"""Device functions that several kernels share: find, load and decode records and raw tokens.

Arguments are those of `arguments.py`. `heads` are uint8 pointers to the start of one head in the code page of each
token of a tile, `slots` the tokens' offsets in their pages. KV is 0 for keys and 1 for values.
"""

import triton
import triton.language as tl

from lexico_kernels.device import launch
from lexico_kernels.memory import layout

LEVEL_BITS = tl.constexpr(layout.LEVEL_BITS)
NUM_LEVELS = tl.constexpr(layout.NUM_LEVELS)
SPAN_TOKENS = tl.constexpr(layout.SPAN_TOKENS)
WORD_BYTES = tl.constexpr(layout.WORD_BYTES)
UNROLL = tl.constexpr(launch.GATHER_UNROLL)


@triton.jit
def page_start(pages_ptr, page_stride, table_ptr, ordinal, valid):
    """Pointers to the pages numbered table[ordinal]; page 0 where not valid. Page offsets can exceed 32 bits."""
    page = tl.load(table_ptr + ordinal, mask=valid, other=0).to(tl.int64)
    return pages_ptr + page * page_stride


@triton.jit
def load_raw(tail, table_ptr, positions, valid, head, KV: tl.constexpr, SIZES: tl.constexpr):
    """Raw K or V of a tile of positions: [TILE, D_PAD], 0 where not valid."""
    R: tl.constexpr = SIZES.R
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    dims = tl.arange(0, D_PAD)
    pages = page_start(tail.data, tail.stride, table_ptr, positions // R, valid)
    rows = pages + ((head * R + positions % R) * 2 + KV) * D
    return tl.load(rows[:, None] + dims[None, :], mask=valid[:, None] & (dims < D)[None, :], other=0.0)


@triton.jit
def load_atoms(atoms_ptr, indices, D: tl.constexpr, D_PAD: tl.constexpr):
    """float32 [TILE, D_PAD]: one atom a row."""
    dims = tl.arange(0, D_PAD)
    rows = atoms_ptr + indices[:, None] * D + dims[None, :]
    return tl.load(rows, mask=(dims < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def halfword_offset(slots, halfword, ADDRESS: tl.constexpr):
    """Where a halfword of the "packed16" records at these slots lies in a head: 0 is the scale, i + 1 entry i.

    The last one alone can be no half of a word; then the tokens of a span have it in a row of halfwords.
    """
    RECORD_BYTES: tl.constexpr = ADDRESS.record_bytes
    word = halfword // 2
    token_bytes = tl.where(word < RECORD_BYTES // WORD_BYTES, WORD_BYTES, 2)
    in_span = word * (SPAN_TOKENS * WORD_BYTES) + halfword % 2 * 2 + slots % SPAN_TOKENS * token_bytes
    return ADDRESS.offset + slots // SPAN_TOKENS * (SPAN_TOKENS * RECORD_BYTES) + in_span


@triton.jit
def decode_tile(heads, slots, valid, head, books, KV: tl.constexpr, DTYPE: tl.constexpr, SIZES: tl.constexpr):
    """float32 [TILE, D_PAD]: K or V of a tile of records without their head's mean; 0 where not valid.

    DTYPE is that of "exact" vectors.
    """
    OWN: tl.constexpr = SIZES.kv[KV]
    ADDRESS: tl.constexpr = OWN.ADDRESS
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    if SIZES.CODEC == "exact":
        dims = tl.arange(0, D_PAD)
        rows = (heads + ADDRESS.offset + slots * ADDRESS.record_bytes).to(tl.pointer_type(DTYPE), bitcast=True)
        mask = valid[:, None] & (dims < D)[None, :]
        vectors = tl.load(rows[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        atoms_ptr = books[KV].atoms + head * OWN.HEAD_STRIDE
        scale_ptr = (heads + halfword_offset(slots, 0, ADDRESS)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
        scale = tl.load(scale_ptr, mask=valid, other=0.0).to(tl.float32)
        vectors = tl.zeros([heads.shape[0], D_PAD], tl.float32)
        SPARSITY: tl.constexpr = ADDRESS.sparsity
        for s in tl.range(SPARSITY, loop_unroll_factor=UNROLL):
            entry_ptr = (heads + halfword_offset(slots, s + 1, ADDRESS)).to(tl.pointer_type(tl.uint16), bitcast=True)
            entry = tl.load(entry_ptr, mask=valid, other=0).to(tl.int32)
            coefficient = tl.load(books[KV].levels + (entry & (NUM_LEVELS - 1)))
            index = tl.minimum(entry >> LEVEL_BITS, OWN.N - 1)  # whatever the bytes are, stay within the dictionary
            vectors += (coefficient * scale)[:, None] * load_atoms(atoms_ptr, index, D, D_PAD)
    return vectors


@triton.jit
def load_of_head(rows_ptr, head, SIZES: tl.constexpr):
    """A head's row of a codebook's means or stretches, float32 [D_PAD]."""
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    dims = tl.arange(0, D_PAD)
    return tl.load(rows_ptr + head * D + dims, mask=dims < D, other=0.0)
