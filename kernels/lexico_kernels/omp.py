"""omp_encode on CUDA: orthogonal matching pursuit of tiles of vectors, straight into the code pages.

One program codes a tile of vectors of one part. A pass streams the dictionary from L2 through tensor cores and keeps
only the best atom of each vector. The least-squares solve stays on chip: beside the residual, a vector keeps the S x
S matrix that writes its orthonormal basis in terms of its chosen atoms. Products with chosen atoms gather the atoms
again (cached) instead of keeping the basis itself, which would not fit.
"""

import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels import layout, reference
from lexico_kernels.cache import LayerCache
from lexico_kernels.launch import WRITE_EXACT, omp_launch
from lexico_kernels.records import FP8_PEAK, LEVEL_BITS, NUM_LEVELS, float_to_fp8, load_atoms

INDEX_MASK = tl.constexpr(layout.MAX_ATOMS - 1)
MIN_FRESH_ENERGY = tl.constexpr(reference.MIN_FRESH**2)


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
def _entries(vector, M, HK: tl.constexpr, source_ptr, destination_ptr, P: tl.constexpr):
    """Source, destination and KV head of flat vector numbers, and which of them are to be coded."""
    entry = vector // HK
    destination = tl.load(destination_ptr + entry, mask=entry < M, other=-1)
    coded = destination >= P
    source = tl.load(source_ptr + entry, mask=coded, other=0)
    return source, destination, vector % HK, coded


@triton.jit
def _unit(x):
    """Rows of length 1, and their norms; rows of zeros and those with NaN or infinity become 0 with norm 0."""
    peak = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    usable = (peak > 0) & (peak < float("inf"))
    scaled = tl.where(usable[:, None], x / tl.where(usable, peak, 1.0)[:, None], 0.0)
    length = tl.where(usable, tl.sqrt(tl.sum(scaled * scaled, 1)), 1.0)
    return scaled / length[:, None], tl.where(usable, peak * length, 0.0)


@triton.jit
def _best_atoms(residual, atoms_ptr, N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, CHUNK: tl.constexpr):
    """int32 [TILE]: the atom of the largest |correlation| with each residual; 0 where all are 0.

    Floats that are not negative order like integers: with the atom's number in the low bits, one maximum finds both.
    """
    dims = tl.arange(0, D_PAD)
    operand = residual.to(atoms_ptr.dtype.element_ty)
    best = tl.zeros([residual.shape[0], CHUNK], tl.int32)  # by column, so that lanes and warps meet once a pass
    for start in tl.range(0, N, CHUNK):
        atoms = start + tl.arange(0, CHUNK)
        mask = (dims < D)[:, None] & (atoms < N)[None, :]
        block = tl.load(atoms_ptr + atoms[None, :] * D + dims[:, None], mask=mask, other=0.0)
        correlation = tl.abs(tl.dot(operand, block, input_precision="tf32"))
        packed = (correlation.to(tl.int32, bitcast=True) & ~INDEX_MASK) | atoms[None, :]
        best = tl.maximum(best, packed)
    best = tl.max(best, 1)
    return tl.where(best > INDEX_MASK, best & INDEX_MASK, 0)


@triton.jit
def _column(matrix, columns, j):
    """Column j of a register matrix."""
    return tl.sum(tl.where(columns[None, :] == j, matrix, 0), 1)


@triton.jit
def _gram(atom, chosen, count, atoms_ptr, D: tl.constexpr, D_PAD: tl.constexpr):
    """float32 [TILE, S_PAD]: products of one atom a row with the row's `count` chosen atoms."""
    columns = tl.arange(0, chosen.shape[1])
    products = tl.zeros(chosen.shape, tl.float32)
    for j in range(count):
        other = load_atoms(atoms_ptr, _column(chosen, columns, j), D, D_PAD)
        products = tl.where(columns[None, :] == j, tl.sum(atom * other, 1)[:, None], products)
    return products


@triton.jit
def _pursue(
    x,
    atoms_ptr,
    sparsity,
    min_energy,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """OMP of unit vectors x [TILE, D_PAD]: atoms int32 [TILE, S_PAD], 0 where none, and coefficients float32.

    basis[m, i, :] holds basis vector i of vector m as a combination of its chosen atoms, so that the coefficients
    after a pass are those before plus the new projection times the new row (Lexico, section 3.2: least squares after
    every choice).
    """
    columns = tl.arange(0, S_PAD)
    chosen = tl.zeros([x.shape[0], S_PAD], tl.int32)
    coefficients = tl.zeros([x.shape[0], S_PAD], tl.float32)
    basis = tl.zeros([x.shape[0], S_PAD, S_PAD], tl.float32)
    residual = x
    active = tl.sum(x * x, 1) > 0
    step = 0
    while step < sparsity:
        index = _best_atoms(residual, atoms_ptr, N, D, D_PAD, CHUNK)
        atom = load_atoms(atoms_ptr, index, D, D_PAD)
        gram = _gram(atom, chosen, step, atoms_ptr, D, D_PAD)
        along = tl.sum(basis * gram[:, None, :], 2)
        fresh = tl.sum(atom * atom, 1) - tl.sum(along * along, 1)
        # An atom within the span of those chosen, or chosen already, won: the residual is orthogonal to all, up to
        # rounding.
        active = active & (index > 0) & (fresh > MIN_FRESH_ENERGY)
        inverse = tl.where(active, 1.0 / tl.sqrt(tl.where(active, fresh, 1.0)), 0.0)
        unit_row = tl.where(columns == step, 1.0, 0.0)
        row = (unit_row[None, :] - tl.sum(along[:, :, None] * basis, 1)) * inverse[:, None]
        basis = tl.where((columns == step)[None, :, None], row[:, None, :], basis)
        projection = tl.sum(atom * residual, 1) * inverse
        coefficients += projection[:, None] * row
        chosen = tl.where((columns == step)[None, :] & active[:, None], index[:, None], chosen)
        residual = x
        for j in range(step + 1):
            chosen_atom = load_atoms(atoms_ptr, _column(chosen, columns, j), D, D_PAD)
            residual -= _column(coefficients, columns, j)[:, None] * chosen_atom
        active = active & (tl.sum(residual * residual, 1) > min_energy)
        any_active = tl.max(active.to(tl.int32), 0)
        step = tl.where(any_active > 0, step + 1, sparsity)
    return chosen, coefficients


@triton.jit
def _nearest_levels(ratio, levels_ptr):
    """Level of each ratio, and the level's value; levels are ascending."""
    level = tl.zeros(ratio.shape, tl.int32)
    for i in tl.static_range(NUM_LEVELS - 1):
        middle = (tl.load(levels_ptr + i) + tl.load(levels_ptr + i + 1)) * 0.5
        level += (ratio > middle).to(tl.int32)
    return level, tl.load(levels_ptr + level)


@triton.jit
def _write_records(
    head_start, slot, coded, chosen, coefficients, levels_ptr, ADDRESS: tl.constexpr, CODEC: tl.constexpr
):
    """Quantise and store the records of a tile; see `reference.encode_vectors`."""
    columns = tl.arange(0, chosen.shape[1])
    scale = tl.max(tl.abs(coefficients), 1).to(tl.bfloat16)
    peak = scale.to(tl.float32)
    usable = (peak > 0) & (peak < float("inf"))
    ratio = coefficients / tl.where(usable, peak, 1.0)[:, None]
    kept = usable[:, None] & (chosen > 0)
    mask = coded[:, None] & (columns < ADDRESS.sparsity)[None, :]
    index_ptr = (head_start + ADDRESS.index_offset + slot * ADDRESS.index_stride).to(
        tl.pointer_type(tl.uint16), bitcast=True
    )
    if CODEC == "packed16":
        level, value = _nearest_levels(ratio, levels_ptr)
        kept = kept & (tl.abs(ratio - value) < tl.abs(ratio))
        entry = tl.where(kept, (chosen << LEVEL_BITS) | level, 0)
    else:
        peak = peak / FP8_PEAK
        entry = tl.where(kept, chosen, 0)
        code = float_to_fp8(tl.where(kept, ratio * FP8_PEAK, 0.0))
        code_ptr = head_start + ADDRESS.coefficient_offset + slot * ADDRESS.coefficient_stride
        tl.store(code_ptr[:, None] + columns[None, :], code.to(tl.uint8), mask=mask)
    tl.store(index_ptr[:, None] + columns[None, :], entry.to(tl.uint16), mask=mask)
    any_kept = tl.max(kept.to(tl.int32), 1) > 0
    scale_ptr = (head_start + ADDRESS.scale_offset + slot * ADDRESS.scale_stride).to(
        tl.pointer_type(tl.bfloat16), bitcast=True
    )
    tl.store(scale_ptr, tl.where(any_kept, peak, 0.0).to(tl.bfloat16), mask=coded)


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
    code_ptr,
    code_page_stride,
    source,
    destination,
    head,
    coded,
    min_energy,
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
    mask = (dims < D)[None, :] & coded[:, None]
    x = raw.to(tl.float32) - tl.load(mean_ptr + head[:, None] * D + dims[None, :], mask=mask, other=0.0)
    x, norm = _unit(x)
    chosen, coefficients = _pursue(x, atoms_ptr, ADDRESS.sparsity, min_energy, N, D, D_PAD, S_PAD, CHUNK)
    head_start = code_ptr + (destination // P) * code_page_stride + head * HEAD_BYTES
    _write_records(head_start, destination % P, coded, chosen, coefficients * norm[:, None], levels_ptr, ADDRESS, CODEC)


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
    value_atoms_ptr,
    value_levels_ptr,
    value_mean_ptr,
    code_ptr,
    code_page_stride,
    source_ptr,
    destination_ptr,
    M,
    min_energy,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    CODEC: tl.constexpr,
    P: tl.constexpr,
    R: tl.constexpr,
    HK: tl.constexpr,
    KEY_N: tl.constexpr,
    VALUE_N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of vectors (entries times heads) of K or V; over at once if none of them is to be coded."""
    vector = tl.program_id(0) * TILE + tl.arange(0, TILE)
    source, destination, head, coded = _entries(vector, M, HK, source_ptr, destination_ptr, P)
    if tl.max(coded.to(tl.int32), 0) == 0:
        return
    if tl.program_id(1) == 0:
        _encode_part(
            key_ptr, key_stride_t, key_stride_h, tail_ptr, tail_page_stride,
            key_atoms_ptr, key_levels_ptr, key_mean_ptr, code_ptr, code_page_stride,
            source, destination, head, coded, min_energy,
            0, KEY, HEAD_BYTES, CODEC, P, R, KEY_N, D, D_PAD, S_PAD, CHUNK,
        )  # fmt: skip
    else:
        _encode_part(
            value_ptr, value_stride_t, value_stride_h, tail_ptr, tail_page_stride,
            value_atoms_ptr, value_levels_ptr, value_mean_ptr, code_ptr, code_page_stride,
            source, destination, head, coded, min_energy,
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
    source, destination, head, coded = _entries(vector, M, HK, source_ptr, destination_ptr, P)
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
    outputs = (cache.code_pages, cache.code_pages.stride(0), source, destination, M)
    sizes = {
        "KEY": layout.address("key"),
        "VALUE": layout.address("value"),
        "HEAD_BYTES": layout.head_bytes,
        "P": layout.block_tokens,
        "R": layout.tail_tokens,
        "HK": Hk,
        "D": D,
        "D_PAD": D_PAD,
    }
    if layout.codec == "exact":
        grid = (triton.cdiv(M * Hk, WRITE_EXACT.tile),)
        _write_exact[grid](*inputs, *outputs, **sizes, TILE=WRITE_EXACT.tile, num_warps=WRITE_EXACT.num_warps)
        return
    S_PAD = triton.next_power_of_2(max(layout.key_sparsity, layout.value_sparsity))
    launch = omp_launch(M * Hk, S_PAD, D_PAD)
    books = (*vars(cache.key).values(), *vars(cache.value).values())
    _omp_encode[(triton.cdiv(M * Hk, launch.tile), 2)](
        *inputs,
        *books,
        *outputs,
        max(relative_error, reference.MIN_RESIDUAL) ** 2,
        **sizes,
        CODEC=layout.codec,
        KEY_N=cache.key.atoms.shape[0],
        VALUE_N=cache.value.atoms.shape[0],
        S_PAD=S_PAD,
        CHUNK=launch.atoms,
        TILE=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
