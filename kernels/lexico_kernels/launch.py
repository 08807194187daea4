"""Launch settings of the kernels: plain data, no tuning while serving. All sizes are powers of two."""

from typing import NamedTuple


class Launch(NamedTuple):
    """How one kernel is launched: rows of its tile, warps, and loads in flight in a pipelined loop."""

    tile: int
    num_warps: int
    num_stages: int = 2


class OmpLaunch(NamedTuple):
    """OMP's launch for up to `max_vectors` vectors a part: few vectors need many small tiles to fill the device."""

    max_vectors: int
    tile: int  # vectors
    atoms: int  # correlated at once
    num_warps: int
    num_stages: int


UNLIMITED = 1 << 62

# By S rounded up to a power of two: a vector's factorisation takes S * S floats of registers.
OMP = {
    8: (
        OmpLaunch(2048, 16, 128, 4, 3),
        OmpLaunch(8192, 32, 128, 4, 3),
        OmpLaunch(UNLIMITED, 64, 128, 4, 3),
    ),
    16: (
        OmpLaunch(2048, 16, 128, 4, 3),
        OmpLaunch(UNLIMITED, 32, 128, 4, 3),  # 64 with 8 warps ran at half the speed
    ),
    32: (
        OmpLaunch(2048, 16, 128, 4, 3),
        OmpLaunch(UNLIMITED, 32, 128, 8, 3),
    ),
}

WRITE_TAIL = Launch(tile=16, num_warps=4)
WRITE_EXACT = Launch(tile=16, num_warps=4)
RECONSTRUCT = Launch(tile=32, num_warps=4)

DECODE = Launch(tile=32, num_warps=4, num_stages=1)  # stages would each hold every gathered atom in shared memory
# Entries of a record whose atoms are fetched together: all of them at once spill registers.
GATHER_UNROLL = 1
# Programs that share one token's context. A context is cut into equal parts of at least MIN_SPLIT_TOKENS, which
# depends on its own length alone: so a token's result is the same in every batch.
DECODE_SPLITS = 16
MIN_SPLIT_TOKENS = 128
MERGE = Launch(tile=1, num_warps=4)


def omp_launch(vectors: int, padded_sparsity: int, padded_dim: int) -> OmpLaunch:
    """The row for that many vectors a part; dictionaries wider than 128 are taken in chunks of fewer atoms."""
    rows = OMP[max(8, padded_sparsity)]
    row = next(row for row in rows if vectors <= row.max_vectors)
    return row._replace(atoms=min(row.atoms, 128 * 128 // padded_dim))
