"""Launch settings of the kernels: plain data, no tuning while serving. All sizes are powers of two."""

from typing import NamedTuple


class Launch(NamedTuple):
    """How one kernel is launched: rows of its tile, and warps."""

    tile: int
    num_warps: int


class PursuitLaunch(NamedTuple):
    """A pursuit's launch for up to `max_vectors` vectors: few vectors need many small tiles to fill the device."""

    max_vectors: int
    tile: int  # vectors
    atoms: int  # correlated at once
    num_warps: int
    num_stages: int


class ClusterLaunch(NamedTuple):
    """Vectors of a tile that each block of a cluster solves, by the sparsity that shared memory has room for."""

    max_sparsity: int
    owned: int


class LayersLaunch(NamedTuple):
    """How `omp_encode_layers` is launched."""

    cluster_tokens: int  # up to which clusters code, more are coded in Triton; all there where there are no clusters
    cluster_blocks: int  # that run at once; others would wait for these to end
    tile: int  # vectors of a Triton program
    few_jobs: int  # of a list, one in 32 of which is coded in the mean
    few_tile: int  # vectors of a program for a list of so few, where no clusters are there
    tiles: int  # of one dictionary that are coded side by side, so that they share its way from memory
    atoms: int
    num_warps: int
    num_stages: int


class PlanLaunch(NamedTuple):
    """How a step's coding is planned."""

    own: int  # tokens of the batch that a program writes down
    counted: int  # that it looks at together
    num_warps: int


UNLIMITED = 1 << 62

OVERLAP = True  # whether a decode step's kernels start before the one before has ended, on GPUs that can
OVERLAP_CAPABILITY = (9, 0)

PURSUIT = (
    PursuitLaunch(4096, 16, 128, 4, 3),
    PursuitLaunch(UNLIMITED, 64, 128, 4, 3),
)
FP8_CAPABILITY = (8, 9)  # of GPUs that multiply e4m3
FP8_MIN_DIM = 128  # with fewer dimensions too much energy is lost (docs/log.md)
FP8_DIMS_PER_ATOM = 8  # at least: where atoms are more, late residuals are so small that near ties decide

CLUSTER = (ClusterLaunch(16, 16), ClusterLaunch(31, 8))
# Blocks that run at once where a cluster of 8 needs as many multiprocessors of one part of the device (H100: 132).
CLUSTER_BLOCKS = 128
# Vectors of a step's tokens up to which `omp_encode` uses clusters; more are faster in Triton (docs/log.md).
CLUSTER_VECTORS = 4096

# And from which on, on Hopper, they are faster where the dictionary streams past 256 of them at a time: as soon as most
# multiprocessors have a tile of so many.
STREAM_VECTORS = 20480
STREAM_CAPABILITY = 9  # of GPUs that have what it is made of; its major number alone
STREAM_DIM, STREAM_SPARSITY = 128, 16  # the only size of heads, and the largest sparsity

LAYERS = LayersLaunch(
    cluster_tokens=64,
    cluster_blocks=120,
    tile=64,
    few_jobs=2048,
    few_tile=16,
    tiles=4,
    atoms=128,
    num_warps=4,
    num_stages=3,
)

WRITE_TAIL = Launch(tile=16, num_warps=4)
WRITE_EXACT = Launch(tile=16, num_warps=4)
RECONSTRUCT = Launch(tile=32, num_warps=4)

PLAN_CODES = PlanLaunch(own=32, counted=256, num_warps=4)
PLAN_TAIL_JOBS = Launch(tile=256, num_warps=4)  # tokens to code
PLAN_TAIL_REQUESTS = 8  # of a program
PLAN_TAIL_PAGES = 64  # of each at a time

DECODE = Launch(tile=32, num_warps=4)
DECODE_STAGES = 1  # of loads in flight; each holds every gathered atom in shared memory
# Entries of a record whose atoms are fetched together: all of them at once spill registers.
GATHER_UNROLL = 1
# Programs that share one token's context. A context is cut into equal parts of at least MIN_SPLIT_TOKENS, which
# depends on its own length alone: so a token's result is the same in every batch.
DECODE_SPLITS = 16
MIN_SPLIT_TOKENS = 128
MERGE_WARPS = 4


def fitting_atoms(atoms: int, padded_dim: int, element_bytes: int) -> int:
    """Atoms correlated at once: that many, or fewer if they have more than 256 bytes, to fit shared memory."""
    return min(atoms, 128 * 256 // (padded_dim * element_bytes))


def fitting_warps(num_warps: int, tile: int, padded_dim: int) -> int:
    """Warps of a tile of residuals: that many, or more if a thread had over 64 of its numbers, to fit registers."""
    return max(num_warps, tile * padded_dim // (32 * 64))


def pursuit_launch(vectors: int, padded_dim: int, element_bytes: int) -> PursuitLaunch:
    """The row for that many vectors; element_bytes: of what vectors are correlated with."""
    row = next(row for row in PURSUIT if vectors <= row.max_vectors)
    warps = fitting_warps(row.num_warps, row.tile, padded_dim)
    return row._replace(atoms=fitting_atoms(row.atoms, padded_dim, element_bytes), num_warps=warps)


def fp8_fits(head_dim: int, sparsity: int) -> bool:
    """Whether codes lose hardly anything by atoms that are chosen by their copies in fp8."""
    return head_dim >= FP8_MIN_DIM and sparsity * FP8_DIMS_PER_ATOM <= head_dim


class LookupSplits(NamedTuple):
    """How `lookup.sparse_decode` cuts contexts."""

    tokens: int  # of a split at most; a multiple of every launch's threads
    fewer_tokens: tuple[int, ...]  # the same where more query heads fit shared memory so, the longest first
    short_context: int  # coded tokens up to which a context is cut finer, for more thread blocks than it would have
    short_tokens: int  # of a split of such a context
    static_bytes: int  # bound on the shared memory that the kernel declares by itself, and what the driver takes


class LookupLaunch(NamedTuple):
    """How `attend_codes` is launched for up to `max_queries` query heads per pass over the codes; see its macros."""

    max_queries: int
    threads: int
    levels_from: int  # 0 shared memory, 1 bytes in registers
    max_blocks: int  # per multiprocessor, for the compiler's budget of registers


class LookupMatmul(NamedTuple):
    """How lookups are made, beside the raw tail."""

    columns: int  # heads of tokens in a program
    tile: int  # atoms
    tiles: int  # that one program goes through
    num_warps: int


class LookupBins(NamedTuple):
    """How bins are multiplied with the atoms where a step has up to `max_columns` query heads of tokens.

    No bit depends on the row, so a token's result is the same in every batch.
    """

    max_columns: int
    columns: int  # of a block


class LookupChunk(NamedTuple):
    """Atoms that a block multiplies bins with, where contexts may have up to `max_splits` splits."""

    max_splits: int
    atoms: int


class LookupTail(NamedTuple):
    """How the raw tail is attended and merged."""

    splits: int
    tile: int
    merge_warps: int


LOOKUP_SPLITS = LookupSplits(
    tokens=4096, fewer_tokens=(3072, 2048), short_context=8192, short_tokens=2048, static_bytes=6144
)
LOOKUP_ATTEND = (
    LookupLaunch(max_queries=4, threads=384, levels_from=1, max_blocks=2),
    LookupLaunch(max_queries=8, threads=512, levels_from=0, max_blocks=1),
)
# Query heads of a KV head that go in one pass where they fit; more go in passes of 4, of which two blocks share a
# multiprocessor: 8 took 400 us so on an H200, 469 in one pass (docs/log.md).
LOOKUP_ONE_PASS = 7
LOOKUP_MATMUL = LookupMatmul(columns=32, tile=64, tiles=2, num_warps=4)
LOOKUP_BINS = (
    LookupBins(max_columns=16, columns=16),
    LookupBins(max_columns=128, columns=32),
    LookupBins(max_columns=UNLIMITED, columns=64),
)
LOOKUP_BINS_SPLITS = 16  # whose bins a thread has on their way at once, at most
LOOKUP_BINS_TURNS = 2  # pieces of a tile for a thread where contexts have one split, so that all blocks run at once
# Long contexts come with small batches, which need more programs; short ones are merged sooner with fewer.
LOOKUP_CHUNKS = (LookupChunk(1, 512), LookupChunk(19, 256), LookupChunk(UNLIMITED, 128))
LOOKUP_TAIL = LookupTail(splits=4, tile=32, merge_warps=1)
LOOKUP_SCRATCH_BYTES = 256 << 20  # tokens are taken in slices that need no more, but for one that does alone


def lookup_launch(queries: int) -> LookupLaunch:
    """The row for that many query heads per pass."""
    return next(row for row in LOOKUP_ATTEND if queries <= row.max_queries)


def lookup_bins(columns: int) -> LookupBins:
    """The row for that many query heads of a step's tokens."""
    return next(row for row in LOOKUP_BINS if columns <= row.max_columns)
