"""omp_encode in Triton: matching pursuit of tiles of vectors, straight into the code pages.

One program codes a tile of K or V vectors of one head: loads them from the batch or the tail, centres and stretches
them, pursues (`pursuit.py`), quantises and writes the records.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, empty, float32, int32

from lexico_kernels import reference
from lexico_kernels.device.arguments import Pages, Rows, Sizes
from lexico_kernels.device.launch import WRITE_EXACT, pursuit_launch
from lexico_kernels.device.records import LEVEL_BITS, halfword_offset
from lexico_kernels.memory import layout as sizes
from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.pages import LayerCache
from lexico_kernels.omp_encode.pursuit import Code, load_code, pursue_tile, quantize_tile, unit_rows, value_bits_for

MOST_LOST, BF16_MAX = tl.constexpr(sizes.MOST_LOST), tl.constexpr(sizes.BF16_MAX)


class EncodeBook(NamedTuple):
    """What codes keys or values of a layer, see `Codebook`. Its sizes are in `Sizes.kv`."""

    atoms: Tensor
    levels: Tensor
    mean: Tensor
    stretch: Tensor
    search_atoms: Tensor  # that residuals are correlated with: copies in fp8, or the atoms themselves
    gain: float

    @classmethod
    def of(cls, book: Codebook) -> "EncodeBook":
        """The argument for a codebook."""
        search_atoms = book.atoms if book.fp8_atoms is None else book.fp8_atoms
        return cls(*book.tensors, search_atoms, float(book.gain))

    @classmethod
    def by_atoms(cls, book: Codebook) -> "EncodeBook":
        """The same, but residuals are correlated with the atoms themselves."""
        return cls(*book.tensors, book.atoms, float(book.gain))


class Jobs(NamedTuple):
    """What is to be coded, see `reference.omp_encode`."""

    source: Tensor
    destination: Tensor
    length: int  # M


@triton.jit
def load_jobs(jobs, at, P: tl.constexpr):
    """Source and destination of the jobs numbered `at`, and which of them are to be coded."""
    destination = tl.load(jobs.destination + at, mask=at < jobs.length, other=-1)
    coded = destination >= P
    source = tl.load(jobs.source + at, mask=coded, other=0)
    return source, destination, coded


@triton.jit
def _load_vectors(rows, tail, source, head, coded, KV: tl.constexpr, SIZES: tl.constexpr):
    """[TILE, D_PAD]: rows of this batch where source >= 0, else tail slots -1 - source; 0 where not coded."""
    R: tl.constexpr = SIZES.R
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    dims = tl.arange(0, D_PAD)
    row, slot = source.to(tl.int64), (-1 - source).to(tl.int64)
    batch = rows.data + row * rows.token_stride + head * rows.head_stride
    stored_at = tail.data + (slot // R) * tail.stride + ((head * R + slot % R) * 2 + KV) * D
    mask = (dims < D)[None, :] & coded[:, None]
    in_batch = mask & (source >= 0)[:, None]
    in_tail = mask & (source < 0)[:, None]
    fresh = tl.load(batch[:, None] + dims[None, :], mask=in_batch, other=0.0)
    stored = tl.load(stored_at[:, None] + dims[None, :], mask=in_tail, other=0.0)
    return tl.where(in_batch, fresh.to(stored.dtype), stored)


@triton.jit
def _write_records(
    head_start, slot, coded, chosen, coefficients, levels_ptr, gain_factor, KV: tl.constexpr, SIZES: tl.constexpr
):
    """Quantise and store the records of a tile, their scales times `gain_factor`; see `reference.encode_vectors`."""
    ADDRESS: tl.constexpr = SIZES.kv[KV].ADDRESS
    columns = tl.arange(0, chosen.shape[1])
    level, peak, kept, _ = quantize_tile(chosen, coefficients, levels_ptr)
    mask = coded[:, None] & (columns < ADDRESS.sparsity)[None, :]
    entries = head_start[:, None] + halfword_offset(slot[:, None], columns[None, :] + 1, ADDRESS)
    entry = tl.where(kept, (chosen << LEVEL_BITS) | level, 0)
    tl.store(entries.to(tl.pointer_type(tl.uint16), bitcast=True), entry.to(tl.uint16), mask=mask)
    any_kept = tl.max(kept.to(tl.int32), 1) > 0
    scale_ptr = (head_start + halfword_offset(slot, 0, ADDRESS)).to(tl.pointer_type(tl.bfloat16), bitcast=True)
    tl.store(scale_ptr, tl.where(any_kept, tl.minimum(peak * gain_factor, BF16_MAX), 0.0).to(tl.bfloat16), mask=coded)


@triton.jit
def encode_tile(
    rows,
    tail,
    codes,
    book,
    scratch,
    source,
    destination,
    coded,
    head,
    min_energy,
    value_bits,
    KV: tl.constexpr,
    SIZES: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Code one tile of a head's K (KV 0) or V (1) vectors; `scratch` is a `Code` of pointers to a row per vector."""
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    P: tl.constexpr = SIZES.P
    N: tl.constexpr = SIZES.kv[KV].N
    SPARSITY: tl.constexpr = SIZES.kv[KV].ADDRESS.sparsity
    HEAD_STRIDE: tl.constexpr = SIZES.kv[KV].HEAD_STRIDE
    dims = tl.arange(0, D_PAD)
    raw = _load_vectors(rows, tail, source, head, coded, KV, SIZES)
    x = raw.to(tl.float32) - tl.load(book.mean + head * D + dims, mask=dims < D, other=0.0)[None, :]
    x = x / tl.load(book.stretch + head * D + dims, mask=dims < D, other=1.0)[None, :]
    x, norm = unit_rows(x)
    residual = pursue_tile(
        x, book.atoms + head * HEAD_STRIDE, book.search_atoms + head * HEAD_STRIDE, scratch, coded, SPARSITY,
        min_energy, value_bits, N, D, D_PAD, CHUNK,
    )  # fmt: skip
    chosen, coefficients = load_code(scratch, coded, SPARSITY, S_PAD)
    head_start = codes.data + (destination // P) * codes.stride + head * SIZES.HEAD_BYTES
    lost = tl.minimum(tl.sum(residual * residual, 1), MOST_LOST)
    gain_factor = tl.exp2(-book.gain * tl.log2(1 - lost))
    coefficients *= norm[:, None]
    _write_records(head_start, destination % P, coded, chosen, coefficients, book.levels, gain_factor, KV, SIZES)


@triton.jit
def _omp_encode(
    key,
    value,
    tail,
    codes,
    books,
    jobs,
    scratch,
    min_energy,
    value_bits,
    SIZES: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of a head's K or V; over at once if none of it is to be coded."""
    P: tl.constexpr = SIZES.P
    job = tl.program_id(0) * TILE + tl.arange(0, TILE)
    source, destination, coded = load_jobs(jobs, job, P)
    if tl.max(coded.to(tl.int32), 0) == 0:
        return
    row = (tl.program_id(1).to(tl.int64) * jobs.length + job) * S_PAD
    own = Code(scratch.atoms + row, scratch.coefficients + row)
    head, rows = tl.program_id(1) // 2, (key, value)
    for kv in tl.static_range(2):
        if tl.program_id(1) % 2 == kv:
            encode_tile(
                rows[kv], tail, codes, books[kv], own, source, destination, coded, head, min_energy, value_bits,
                kv, SIZES, S_PAD, CHUNK,
            )  # fmt: skip


@triton.jit
def _copy_vectors(rows, tail, head_start, slot, source, head, coded, KV: tl.constexpr, SIZES: tl.constexpr):
    """Copy one tile of K (KV 0) or V (1) vectors into "exact" records."""
    ADDRESS: tl.constexpr = SIZES.kv[KV].ADDRESS
    dims = tl.arange(0, SIZES.D_PAD)
    vectors = _load_vectors(rows, tail, source, head, coded, KV, SIZES)
    element: tl.constexpr = tl.pointer_type(tail.data.dtype.element_ty)
    record = (head_start + ADDRESS.offset + slot * ADDRESS.record_bytes).to(element, bitcast=True)
    tl.store(record[:, None] + dims[None, :], vectors, mask=coded[:, None] & (dims < SIZES.D)[None, :])


@triton.jit
def _write_exact(key, value, tail, codes, jobs, HK: tl.constexpr, SIZES: tl.constexpr, TILE: tl.constexpr):
    """The "exact" codec: one tile of vectors, K and V, copied as they are."""
    P: tl.constexpr = SIZES.P
    vector = tl.program_id(0) * TILE + tl.arange(0, TILE)
    source, destination, coded = load_jobs(jobs, vector // HK, P)
    head, rows = vector % HK, (key, value)
    head_start = codes.data + (destination // P) * codes.stride + head * SIZES.HEAD_BYTES
    for kv in tl.static_range(2):
        _copy_vectors(rows[kv], tail, head_start, destination % P, source, head, coded, kv, SIZES)


def omp_encode(
    key: Tensor, value: Tensor, cache: LayerCache, source: Tensor, destination: Tensor, *, relative_error: float = 0.0
) -> None:
    """Triton version of `reference.omp_encode`."""
    layout, M = cache.layout, source.shape[0]
    if M == 0:
        return
    Hk, SIZES = layout.num_kv_heads, Sizes.of(cache)
    shared = (Rows.of(key), Rows.of(value), Pages.tail(cache), Pages.codes(cache))
    jobs = Jobs(source, destination, M)
    if layout.codec == "exact":
        grid = (triton.cdiv(M * Hk, WRITE_EXACT.tile),)
        _write_exact[grid](*shared, jobs, HK=Hk, SIZES=SIZES, TILE=WRITE_EXACT.tile, num_warps=WRITE_EXACT.num_warps)
        return
    S_PAD = padded_sparsity(cache)
    books = (EncodeBook.of(cache.key), EncodeBook.of(cache.value))
    launch = pursuit_launch(2 * M * Hk, SIZES.D_PAD, max(book.search_atoms.element_size() for book in books))
    _omp_encode[(triton.cdiv(M, launch.tile), 2 * Hk)](
        *shared,
        books,
        jobs,
        scratch_for(2 * M * Hk * S_PAD, key),
        max(relative_error, reference.MIN_RESIDUAL) ** 2,
        value_bits_for(max(cache.key.num_atoms, cache.value.num_atoms)),
        SIZES=SIZES,
        S_PAD=S_PAD,
        CHUNK=launch.atoms,
        TILE=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def padded_sparsity(cache: LayerCache) -> int:
    """Numbers in a row of scratch: a power of two that holds the code of a K or V vector."""
    return triton.next_power_of_2(max(cache.layout.key_sparsity, cache.layout.value_sparsity))


def scratch_for(numbers: int, like: Tensor) -> Code:
    """Memory for so many atoms and coefficients of codes under way, on the same device."""
    return Code(*(empty(numbers, dtype=dtype, device=like.device) for dtype in (int32, float32)))
