"""Matching pursuit of tiles of vectors on CUDA (Lexico, section 3.2): what coding and training share.

A pass streams the dictionary from L2 through tensor cores and keeps only each vector's best atom. The least-squares
solve on the chosen atoms is coordinate descent: going from the newest atom to the oldest, each coefficient takes what
the residual still has along its atom. It needs no Gram matrix and no basis, only the residual, which is what the next
pass correlates. On learned dictionaries two such sweeps a pass end within 0.3 % of the exact solution's energy; the
more alike atoms are, the further from it they stay (docs/log.md).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor, empty, float32, int32

from lexico_kernels import reference
from lexico_kernels.device.launch import pursuit_launch
from lexico_kernels.device.records import load_atoms
from lexico_kernels.memory import layout

NUM_LEVELS = tl.constexpr(layout.NUM_LEVELS)
FP8_PEAK = tl.constexpr(reference.FP8_PEAK)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # without a compiler there is no assembly


class Code(NamedTuple):
    """Atoms and coefficients of codes in memory, a row of them per vector; or, in a kernel, pointers to rows."""

    atoms: Tensor  # int32
    coefficients: Tensor  # float32


@triton.jit
def unit_rows(x):
    """Rows of length 1, and their norms; rows of zeros and of no finite norm become 0 with norm 0."""
    peak = tl.max(tl.where(x == x, tl.abs(x), float("inf")), 1)
    usable = (peak > 0) & (peak < float("inf"))
    scaled = tl.where(usable[:, None], x / tl.where(usable, peak, 1.0)[:, None], 0.0)
    length = tl.where(usable, tl.sqrt(tl.sum(scaled * scaled, 1)), 1.0)
    usable &= peak * length < float("inf")
    return tl.where(usable[:, None], scaled / length[:, None], 0.0), tl.where(usable, peak * length, 0.0)


@triton.jit
def _operand(residual, energy, dtype: tl.constexpr):
    """Residuals as the product with atoms of that dtype takes them; for e4m3 all of one length, within its range."""
    if dtype == tl.float8e4nv:
        residual *= (tl.rsqrt(tl.maximum(energy, 1e-30)) * FP8_PEAK)[:, None]
    return residual.to(dtype)


@triton.jit
def _masked_or(bits, mask, piece):
    """bits & mask | piece, in one instruction: ptxas makes two of it, which is a third of the work on a correlation."""
    if INTERPRETED:
        return bits & mask | piece
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, $3, 0xEA;", "=r,r,r,r", [bits, mask, piece], tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _best_atoms(
    operand,
    search_atoms_ptr,
    row_bits,
    value_bits,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """int32 [TILE]: the atom of the largest |correlation| with each residual; 0 where all are 0.

    Floats that are not negative order like integers: with the atom's number in the low bits, one maximum finds both.
    The number comes in three pieces, so that the work on each correlation is one bit operation with a constant and half
    a maximum: chunk and column within eight neighbours are added to the few that are left. `value_bits` says which bits
    are not the number's, see `value_bits_for`. `row_bits` int32 [TILE] are the
    same, or 0 for rows that take no atom.
    """
    index_mask = value_bits ^ 0x7FFFFFFF
    TILE: tl.constexpr = operand.shape[0]
    OCTETS: tl.constexpr = CHUNK // 8
    dims = tl.arange(0, D_PAD)
    octet, eighth = tl.arange(0, OCTETS), tl.arange(0, 8)
    best = tl.zeros([TILE, 8], tl.int32)
    for start in tl.range(0, N, CHUNK):
        atoms = start + tl.arange(0, CHUNK)
        rows = search_atoms_ptr + atoms[None, :] * D + dims[:, None]
        if N % CHUNK == 0 and D == D_PAD:
            block = tl.load(rows)
        else:
            block = tl.load(rows, mask=(dims < D)[:, None] & (atoms < N)[None, :], other=0.0)
        correlation = tl.dot(operand, block, input_precision="tf32")
        bits = tl.reshape(correlation.to(tl.int32, bitcast=True), [TILE, OCTETS, 8])
        packed = _masked_or(bits, row_bits[:, None, None], octet[None, :, None])
        best = tl.maximum(best, tl.max(packed, 1) | start)
    best = tl.max(best | eighth[None, :] * OCTETS, 1)
    index = best & index_mask
    index = index // CHUNK * CHUNK + index % OCTETS * 8 + index % CHUNK // OCTETS
    return tl.where(best > index_mask, index, 0)


@triton.jit
def pursue_tile(
    x,
    atoms_ptr,
    search_atoms_ptr,
    rows,
    valid,
    sparsity,
    min_energy,
    value_bits,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Pursuit of unit vectors x [TILE, D_PAD]; returns their residual, which is x minus the code.

    Atoms are chosen by their copies at search_atoms_ptr, of fewer bits or the same, and solved for as they are at
    atoms_ptr. The code is left in memory, where it is a loop of loads away instead of in registers, which the residual
    needs: `rows` is a `Code` of pointers to `sparsity` numbers of each valid vector, atom 0 where nothing was chosen. A
    vector whose residual's energy falls to min_energy takes no more atoms.
    """
    residual = x
    step = 0
    while step < sparsity:
        energy = tl.sum(residual * residual, 1)
        operand = _operand(residual, energy, search_atoms_ptr.dtype.element_ty)
        row_bits = tl.where(energy > min_energy, value_bits, 0)
        index = _best_atoms(operand, search_atoms_ptr, row_bits, value_bits, N, D, D_PAD, CHUNK)
        tl.store(rows.atoms + step, index, mask=valid)
        tl.store(rows.coefficients + step, tl.zeros_like(index).to(tl.float32), mask=valid)
        tl.debug_barrier()  # other threads read the rows
        # What an early sweep leaves the last ones take; in 64 dimensions atoms are more alike.
        sweeps = (128 // D if D < 128 else 1) + (step + 3 >= sparsity).to(tl.int32) + step * 8 // D
        for visit in range((step + 1) * sweeps):
            at = step - visit % (step + 1)
            atom = load_atoms(atoms_ptr, tl.load(rows.atoms + at, mask=valid, other=0), D, D_PAD)
            change = tl.sum(atom * residual, 1)
            residual -= change[:, None] * atom
            # Adding in memory needs no value back, so that no thread waits here for another.
            tl.atomic_add(rows.coefficients + at, change, mask=valid, sem="relaxed", scope="cta")
        step += 1
    tl.debug_barrier()
    return residual


@triton.jit
def load_code(rows, valid, sparsity, S_PAD: tl.constexpr):
    """The code that `pursue_tile` left: atoms int32 and coefficients float32 [TILE, S_PAD]."""
    columns = tl.arange(0, S_PAD)
    mask = valid[:, None] & (columns < sparsity)[None, :]
    chosen = tl.load(rows.atoms[:, None] + columns[None, :], mask=mask, other=0)
    # The sums are in L2; L1 may have older ones that came with a neighbour's row.
    at = rows.coefficients[:, None] + columns[None, :]
    return chosen, tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def nearest_levels(ratio, levels_ptr):
    """Level of each ratio, and the level's value; levels are ascending."""
    level = tl.zeros(ratio.shape, tl.int32)
    for i in tl.static_range(NUM_LEVELS - 1):
        middle = (tl.load(levels_ptr + i) + tl.load(levels_ptr + i + 1)) * 0.5
        level += (ratio > middle).to(tl.int32)
    return level, tl.load(levels_ptr + level)


@triton.jit
def quantize_tile(chosen, coefficients, levels_ptr):
    """Nearest levels, the bf16 scale as float32, what zero describes worse, and the quantized ratios."""
    peak = tl.max(tl.abs(coefficients), 1).to(tl.bfloat16).to(tl.float32)
    usable = (peak > 0) & (peak < float("inf"))
    ratio = coefficients / tl.where(usable, peak, 1.0)[:, None]
    level, value = nearest_levels(ratio, levels_ptr)
    kept = usable[:, None] & (chosen > 0) & (tl.abs(ratio - value) < tl.abs(ratio))
    return level, peak, kept, value


@triton.jit(do_not_specialize=["sparsity"])
def _pursue(
    vectors_ptr,
    atoms_ptr,
    levels_ptr,
    code,
    residual_ptr,
    M,
    sparsity,
    min_energy,
    value_bits,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of one group's vectors; codes are quantized where there are levels. `code` is a `Code`."""
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    valid = row < M
    dims, columns = tl.arange(0, D_PAD), tl.arange(0, S_PAD)
    at = (group * M + row)[:, None] * D + dims[None, :]
    mask = valid[:, None] & (dims < D)[None, :]
    x, norm = unit_rows(tl.load(vectors_ptr + at, mask=mask, other=0.0).to(tl.float32))
    atoms_ptr += group * N * D
    first = (group * M + row) * sparsity
    rows = Code(code.atoms + first, code.coefficients + first)
    residual = pursue_tile(
        x, atoms_ptr, atoms_ptr, rows, valid, sparsity, min_energy, value_bits, N, D, D_PAD, CHUNK
    )  # fmt: skip
    chosen, coefficients = load_code(rows, valid, sparsity, S_PAD)
    coefficients = coefficients * norm[:, None]
    residual = residual * norm[:, None]
    stored = valid[:, None] & (columns < sparsity)[None, :]
    if levels_ptr is not None:
        _, peak, kept, value = quantize_tile(chosen, coefficients, levels_ptr + group * NUM_LEVELS)
        quantized = tl.where(kept, value * peak[:, None], 0.0)
        tl.store(rows.coefficients[:, None] + columns[None, :], coefficients - quantized, mask=stored)
        tl.debug_barrier()
        for j in range(sparsity):
            atom = load_atoms(atoms_ptr, tl.load(rows.atoms + j, mask=valid, other=0), D, D_PAD)
            residual += tl.load(rows.coefficients + j, mask=valid, other=0.0)[:, None] * atom
        tl.debug_barrier()
        chosen, coefficients = tl.where(kept, chosen, 0), quantized
    tl.store(rows.atoms[:, None] + columns[None, :], chosen, mask=stored)
    tl.store(rows.coefficients[:, None] + columns[None, :], tl.where(chosen > 0, coefficients, 0.0), mask=stored)
    tl.store(residual_ptr + at, residual, mask=mask)


def value_bits_for(atoms: int) -> int:
    """Bits of a float that keep its value beside an atom's number: not the sign, and not the low bits."""
    return 0x7FFFFFFF ^ (max(layout.MAX_ATOMS, triton.next_power_of_2(atoms)) - 1)


def pursue(
    vectors: Tensor, atoms: Tensor, sparsity: int, levels: Tensor | None = None, *, relative_error: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Triton version of `reference.pursue`."""
    groups, M, D = vectors.shape
    N, D_PAD, S_PAD = atoms.shape[1], triton.next_power_of_2(D), triton.next_power_of_2(sparsity)
    code = Code(*(empty(groups, M, sparsity, dtype=dtype, device=vectors.device) for dtype in (int32, float32)))
    residual = empty(groups, M, D, dtype=float32, device=vectors.device)
    launch = pursuit_launch(groups * M, D_PAD, atoms.element_size())
    _pursue[(triton.cdiv(M, launch.tile), groups)](
        vectors.contiguous(),
        atoms.contiguous(),
        levels if levels is None else levels.contiguous(),
        code,
        residual,
        M,
        sparsity,
        max(relative_error, reference.MIN_RESIDUAL) ** 2,
        value_bits_for(N),
        N=N,
        D=D,
        D_PAD=D_PAD,
        S_PAD=S_PAD,
        CHUNK=launch.atoms,
        TILE=launch.tile,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return code.atoms, code.coefficients, residual
