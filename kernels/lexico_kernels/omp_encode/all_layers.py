"""omp_encode of all layers in one launch, in Triton: a step of decode codes few tokens, so few that one layer's would
not fill the device. `tiles.py` codes a tile; what varies with the layer comes from a table of addresses.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels import reference
from lexico_kernels.device.arguments import Book, Pages, Rows, Sizes
from lexico_kernels.device.launch import LAYERS, fitting_atoms, fitting_warps
from lexico_kernels.memory.layout import KV
from lexico_kernels.memory.pages import LayerStack
from lexico_kernels.omp_encode import tiles
from lexico_kernels.omp_encode.pursuit import Code, value_bits_for
from lexico_kernels.omp_encode.tiles import EncodeBook, Jobs, encode_tile, load_jobs


class StackColumns(NamedTuple):
    """Compile-time constants: where in a row of `LayerStack.addresses` which tensor's address is."""

    COUNT: int
    TAIL: int
    CODES: int
    BOOKS: tuple[Book, ...]  # columns in place of tensors


COLUMNS = StackColumns(
    len(LayerStack.COLUMNS),
    LayerStack.column("tail_pages"),
    LayerStack.column("code_pages"),
    tuple(Book(*(LayerStack.column(f"{kv}.{name}") for name in Book._fields)) for kv in KV),  # type: ignore[arg-type]
)


@triton.jit
def _of_layer(first_ptr, addresses_ptr, row, COLUMN: tl.constexpr):
    """A layer's tensor, given the first layer's, from which it is a multiple of 16 bytes away; `row` is its addresses'.

    Not the address as it is in the table: the compiler must see that it is aligned, to copy 16 bytes at once.
    """
    away = tl.load(addresses_ptr + row + COLUMN) - tl.load(addresses_ptr + COLUMN)
    element_bytes: tl.constexpr = first_ptr.dtype.element_ty.primitive_bitwidth // 8
    return first_ptr + tl.multiple_of(away // element_bytes, 16 // element_bytes)


@triton.jit
def _book_of_layer(book, addresses_ptr, row, KV: tl.constexpr, COLUMNS: tl.constexpr):
    """A layer's `EncodeBook`, given the first layer's. Few vectors gain nothing by atoms in fp8."""
    ATOMS: tl.constexpr = COLUMNS.BOOKS[KV].atoms
    LEVELS: tl.constexpr = COLUMNS.BOOKS[KV].levels
    MEAN: tl.constexpr = COLUMNS.BOOKS[KV].mean
    STRETCH: tl.constexpr = COLUMNS.BOOKS[KV].stretch
    atoms = _of_layer(book.atoms, addresses_ptr, row, ATOMS)
    levels = _of_layer(book.levels, addresses_ptr, row, LEVELS)
    mean = _of_layer(book.mean, addresses_ptr, row, MEAN)
    stretch = _of_layer(book.stretch, addresses_ptr, row, STRETCH)
    return EncodeBook(atoms, levels, mean, stretch, atoms, book.gain)


@triton.jit
def _omp_encode_layers(
    addresses_ptr,
    tail,
    codes,
    books,
    jobs,
    scratch,
    fewer,
    min_energy,
    value_bits,
    HK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZES: tl.constexpr,
    S_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Some tiles of one layer's and head's K or V, until one has nothing to be coded; pointers are the first layer's.

    Codes nothing where the list has no job number `fewer` to be coded: then `clusters.py` does.
    """
    P: tl.constexpr = SIZES.P
    TAIL: tl.constexpr = COLUMNS.TAIL
    CODES: tl.constexpr = COLUMNS.CODES
    if tl.load(jobs.destination + fewer) < P:
        return
    layer, head, own_kv = tl.program_id(1) // (2 * HK), tl.program_id(1) % (2 * HK) // 2, tl.program_id(1) % 2
    row = ((tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * TILE + tl.arange(0, TILE)) * S_PAD
    own = Code(scratch.atoms + row, scratch.coefficients + row)
    addresses = layer * COLUMNS.COUNT
    own_tail = Pages(_of_layer(tail.data, addresses_ptr, addresses, TAIL), tail.stride)
    own_codes = Pages(_of_layer(codes.data, addresses_ptr, addresses, CODES), codes.stride)
    start = tl.program_id(0) * TILE
    while start < jobs.length:
        source, destination, coded = load_jobs(jobs, start + tl.arange(0, TILE), P)
        start += tl.num_programs(0) * TILE
        if tl.max(coded.to(tl.int32), 0) == 0:
            start = jobs.length
        else:
            for kv in tl.static_range(2):
                if own_kv == kv:
                    encode_tile(
                        Rows(own_tail.data, 0, 0), own_tail, own_codes,
                        _book_of_layer(books[kv], addresses_ptr, addresses, kv, COLUMNS),
                        own, source, destination, coded, head, min_energy, value_bits, kv, SIZES, S_PAD, CHUNK,
                    )  # fmt: skip
        tl.debug_barrier()  # the next tile takes the same scratch


def omp_encode_layers(
    layers: LayerStack, source: Tensor, destination: Tensor, *, relative_error: float = 0.0, fewer: int = 0
) -> None:
    """Triton version of `reference.omp_encode_layers`. fewer: jobs that are left to another launch.

    A pass over the atoms takes as long for few vectors as for many, so where all lists come here, the tiles of short
    ones are small, and more multiprocessors share the work.
    """
    cache, M = layers.caches[0], source.shape[0]
    layout = cache.layout
    if fewer >= M:
        return
    if layout.codec == "exact":
        for each in layers.caches:
            nothing = each.tail_pages.new_empty(0, layout.num_kv_heads, layout.head_dim)
            tiles.omp_encode(nothing, nothing, each, source, destination)
        return
    Hk, SIZES, S_PAD = layout.num_kv_heads, Sizes.of(cache), tiles.padded_sparsity(cache)
    tile = LAYERS.few_tile if not fewer and LAYERS.few_jobs >= M else LAYERS.tile
    grid = (min(LAYERS.tiles, triton.cdiv(M, tile)), 2 * Hk * len(layers.caches))
    _omp_encode_layers[grid](
        layers.addresses,
        Pages.tail(cache),
        Pages.codes(cache),
        (EncodeBook.by_atoms(cache.key), EncodeBook.by_atoms(cache.value)),
        Jobs(source, destination, M),
        tiles.scratch_for(grid[0] * grid[1] * tile * S_PAD, source),
        fewer,
        max(relative_error, reference.MIN_RESIDUAL) ** 2,
        value_bits_for(max(cache.key.num_atoms, cache.value.num_atoms)),
        HK=Hk,
        COLUMNS=COLUMNS,
        SIZES=SIZES,
        S_PAD=S_PAD,
        CHUNK=fitting_atoms(LAYERS.atoms, SIZES.D_PAD, cache.key.atoms.element_size()),
        TILE=tile,
        num_warps=fitting_warps(LAYERS.num_warps, tile, SIZES.D_PAD),
        num_stages=LAYERS.num_stages,
    )
