"""For tests and benchmarks: the one tolerance table, and random caches whose every unwritten byte is poison."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.layout import ENTRY_BYTES, KV, LEVEL_BITS, NUM_LEVELS, SCALE_BYTES, CodeLayout
from lexico_kernels.memory.pages import LayerCache, RequestTables
from lexico_kernels.memory.records import load_records, store_records
from lexico_kernels.reference import decode_heads, gain_factor, omp, omp_encode, write_tail

# (largest, root mean square) error allowed, as a share of the expected values' root mean square; "lse" in absolute
# terms. Attention: inputs and weights are rounded once to the dtype, as in dense FlashAttention. Dense: one rounding
# of the result.
TOLERANCES: dict[tuple[str, torch.dtype], tuple[float, float]] = {
    ("attention", torch.float32): (1e-4, 1e-5),
    ("attention", torch.float16): (1e-2, 1e-3),
    ("attention", torch.bfloat16): (6e-2, 6e-3),
    ("lse", torch.float32): (1e-4, 2e-5),
    ("lse", torch.float16): (4e-3, 1e-3),
    ("lse", torch.bfloat16): (3e-2, 8e-3),
    ("dense", torch.float32): (2e-5, 2e-6),
    ("dense", torch.float16): (5e-3, 5e-4),
    ("dense", torch.bfloat16): (4e-2, 4e-3),
}
# Residual energy by the OMP kernel over the twin's, quantisation included, over fewer or more than about 1000
# vectors. The kernel chooses atoms in the dictionary's precision, so near ties fall either way and no vector's code
# need be the same.
OMP_ENERGY_RATIO = {"few": 1.04, "many": 1.005}


def assert_close(actual: Tensor, expected: Tensor, kind: str, dtype: torch.dtype) -> None:
    """Check a result against its twin by the tolerance table; NaN or infinity fails unless both agree on -inf.

    Args:
        actual, expected: any one shape.
        kind: "attention", "lse" or "dense".
        dtype: of the inputs.
    """
    actual, expected = actual.double(), expected.double()
    empty = expected == -torch.inf
    assert torch.equal(actual == -torch.inf, empty), f"{kind}: -inf in other places"
    error = (actual - expected)[~empty]
    if not error.numel():
        return
    assert error.isfinite().all(), f"{kind}: {int((~error.isfinite()).sum())} values are not finite"
    unit = 1.0 if kind == "lse" else max(float(expected[~empty].square().mean().sqrt()), 1e-6)
    worst, rms = float(error.abs().max()) / unit, float(error.square().mean().sqrt()) / unit
    allowed = TOLERANCES[kind, dtype]
    assert worst <= allowed[0] and rms <= allowed[1], (
        f"{kind} {dtype}: max {worst:.2e}, rms {rms:.2e}; allowed {allowed}"
    )


@dataclass(frozen=True)
class Problem:
    """A layer's cache with B requests of random content in it.

    Attributes:
        cache: pages and codebooks; whatever no request reads is poison (0xFF codes, NaN tail).
        tables: where the requests live.
        lengths: tokens of each request.
    """

    cache: LayerCache
    tables: RequestTables
    lengths: list[int]


def random_codebook(
    atoms: int,
    layout: CodeLayout,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype,
    *,
    shared: bool = False,
) -> Codebook:
    """Random unit atoms (row 0 is the null atom), uneven levels and stretches, and means larger than what is coded.

    shared: by all heads.
    """
    rows = torch.randn(1 if shared else layout.num_kv_heads, atoms, layout.head_dim, generator=generator)
    rows = normalize(rows, dim=-1)
    rows[:, 0] = 0
    levels = torch.linspace(-1, 1, NUM_LEVELS) + 0.02 * torch.rand(NUM_LEVELS, generator=generator)
    mean = 2 * torch.randn(layout.num_kv_heads, layout.head_dim, generator=generator)
    stretch = 0.5 + torch.rand(mean.shape, generator=generator)
    return Codebook(rows.to(device, dtype), levels.to(device), mean.to(device), stretch.to(device))


def poisoned_cache(
    layout: CodeLayout, num_pages: int, *, atoms: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> LayerCache:
    """A cache whose codes are 0xFF and whose tail is NaN, with gaps between pages.

    Each head has a dictionary of its own for keys; for values all share one.

    Args:
        layout: of the pages.
        num_pages: of each kind, page 0 included.
        atoms: N of both dictionaries.
        dtype: of the tail and the atoms.
        device: of all tensors.
        seed: of the codebooks.
    """
    generator = torch.Generator().manual_seed(seed)
    place = torch.device(device)
    tail_shape = (num_pages, layout.num_kv_heads, layout.tail_tokens, 2, layout.head_dim)
    page_elements = layout.tail_page_bytes // layout.element_bytes
    tail = torch.full((num_pages, page_elements + 64), torch.nan, dtype=dtype, device=place)
    key, value = (random_codebook(atoms, layout, generator, place, dtype, shared=shared) for shared in (False, True))
    return LayerCache(
        torch.full((num_pages, layout.page_bytes + 128), 0xFF, dtype=torch.uint8, device=place),
        tail[:, :page_elements].view(tail_shape),
        key,
        value,
        layout,
    )


def raised_cache(cache: LayerCache) -> LayerCache:
    """The same pages with codebooks that have a gain, each another."""
    return replace(cache, key=replace(cache.key, gain=0.375), value=replace(cache.value, gain=1.0))


def fp8_cache(cache: LayerCache) -> LayerCache:
    """The same pages with codebooks that have atoms in fp8."""
    return replace(cache, key=cache.key.with_fp8_atoms(), value=cache.value.with_fp8_atoms())


def stream_cache(cache: LayerCache) -> LayerCache:
    """The same pages with codebooks that `streams.py` codes by."""
    cache = fp8_cache(cache)
    return replace(cache, key=cache.key.with_stream_atoms(), value=cache.value.with_stream_atoms())


def random_records(
    count: int, layout: CodeLayout, kv: str, atoms: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Valid records of random vectors: uint8 [count, Hk, vector_bytes]."""
    shape, S = (count, layout.num_kv_heads), layout.sparsity(kv)
    if layout.codec == "exact":
        return torch.randn(*shape, layout.head_dim, generator=generator).to(dtype).view(torch.uint8)
    scale = (0.5 + torch.rand(*shape, 1, generator=generator)).bfloat16()
    index = torch.randint(0, atoms, (*shape, S), generator=generator)
    if layout.codec == "paper":
        small = torch.randn(*shape, S, generator=generator).to(torch.float8_e4m3fn)
        fields = [scale, index.to(torch.int16), small]
    else:
        entries = index << LEVEL_BITS | torch.randint(0, NUM_LEVELS, index.shape, generator=generator)
        fields = [scale, torch.where(entries < 1 << 15, entries, entries - (1 << 16)).to(torch.int16)]
    return torch.cat([field.view(torch.uint8) for field in fields], -1)


def random_problem(
    layout: CodeLayout,
    lengths: Sequence[int],
    *,
    atoms: int = 256,
    dtype: torch.dtype = torch.float16,
    device: str = "cpu",
    sink_pages: int = 1,
    raw_tokens: int | None = None,
    seed: int = 0,
) -> Problem:
    """Requests of the given lengths with random content.

    Codes exist exactly for the positions that are read as codes, raw tokens exactly for the raw ranges. Table entries
    that must not be read point to page 0, which is poison.

    Args:
        layout: of the pages.
        lengths: tokens of each request.
        atoms: N of both dictionaries.
        dtype: of the model.
        device: of all tensors.
        sink_pages: tail pages of raw tokens at the start of each request.
        raw_tokens: at least this many tokens at the end are raw; all from the middle on if None.
        seed: of the content.
    """
    P, R, B = layout.block_tokens, layout.tail_tokens, len(lengths)
    generator = torch.Generator().manual_seed(seed)
    longest = max(max(lengths), 1)
    blocks, tails = -(-longest // P), -(-longest // R)
    cache = poisoned_cache(layout, 1 + B * max(blocks, tails), atoms=atoms, dtype=dtype, device=device, seed=seed)
    pages = (1 + torch.randperm(cache.code_pages.shape[0] - 1, generator=generator)).int()
    table, tail_table = pages[: B * blocks].view(B, blocks).clone(), pages[: B * tails].view(B, tails).clone()
    sink_end, raw_start = torch.zeros(B, dtype=torch.int32), torch.zeros(B, dtype=torch.int32)
    for request, length in enumerate(lengths):
        raw = length // 2 if raw_tokens is None else raw_tokens
        sink_end[request] = min(sink_pages * R, -(-length // R) * R)
        raw_start[request] = max(int(sink_end[request]), max(length - raw, 0) // R * R)
        positions = torch.arange(length)
        coded = (positions >= sink_end[request]) & (positions < raw_start[request])
        _fill_codes(cache, table[request], positions[coded], atoms, dtype, generator)
        _fill_tail(cache, tail_table[request], positions[~coded], dtype, generator)
        used = torch.zeros(tails, dtype=torch.bool)
        used[positions[~coded] // R] = True
        tail_table[request][~used] = 0
    tables = RequestTables(*(tensor.to(device) for tensor in (table, tail_table, sink_end, raw_start)))
    return Problem(cache, tables, list(lengths))


def _fill_codes(
    cache: LayerCache, table: Tensor, positions: Tensor, atoms: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    layout, P, device = cache.layout, cache.layout.block_tokens, cache.code_pages.device
    slots = (table[positions // P].long() * P + positions % P).to(device)
    for kv in KV:
        records = random_records(len(positions), layout, kv, atoms, dtype, generator).to(device)
        store_records(cache.code_pages, layout, kv, slots, records)


def _fill_tail(
    cache: LayerCache, table: Tensor, positions: Tensor, dtype: torch.dtype, generator: torch.Generator
) -> None:
    layout, R, device = cache.layout, cache.layout.tail_tokens, cache.code_pages.device
    tokens = torch.randn(len(positions), layout.num_kv_heads, 2, layout.head_dim, generator=generator)
    cache.tail_pages[table[positions // R].long().to(device), :, (positions % R).to(device)] = tokens.to(device, dtype)


def fused_tokens(
    count: int, layout: CodeLayout, dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random K and V [count, Hk, D] as rows of a wider buffer, as a fused QKV projection leaves them."""
    heads, generator = layout.num_kv_heads, torch.Generator().manual_seed(seed)
    wide = torch.randn(count, 3 * heads, layout.head_dim, generator=generator).to(device, dtype)
    return wide[:, :heads], wide[:, heads : 2 * heads]


def vectors_like_the_dictionary(count: int, cache: LayerCache, seed: int = 0) -> list[Tensor]:
    """K and V [count, Hk, D]: sums of atoms of falling size and noise around their head's mean, as real ones are."""
    device, out = cache.code_pages.device, []
    generator = torch.Generator(device).manual_seed(seed)
    for book in (cache.key, cache.value):
        shape = (count, cache.layout.num_kv_heads, 24)
        heads = torch.arange(shape[1], device=device)[:, None] % len(book.atoms)
        index = torch.randint(1, book.num_atoms, shape, generator=generator, device=device)
        weight = torch.randn(shape, generator=generator, device=device) * 0.85 ** torch.arange(24, device=device)
        x = torch.einsum("mhs,mhsd->mhd", weight, book.atoms[heads, index].float()) * book.stretch + book.mean
        x += 0.02 * torch.randn(x.shape, generator=generator, device=device)
        out.append(x.to(cache.tail_pages.dtype))
    return out


def records_at(cache: LayerCache, slots: Tensor, kv: str) -> Tensor:
    """Records uint8 [M, Hk, vector_bytes] at slots int64 [M]."""
    return load_records(cache.code_pages, cache.layout, kv, slots)


def entries_at(cache: LayerCache, slots: Tensor, kv: str) -> Tensor:
    """Entries int16 [M, Hk, S] of the "packed16" records at slots int64 [M]."""
    return records_at(cache, slots, kv)[..., SCALE_BYTES:].contiguous().view(torch.int16)


def clear_entries(cache: LayerCache, kv: str, first: int) -> None:
    """Let the entries from `first` on of all "packed16" records name the null atom at the lowest level."""
    slots = torch.arange(cache.code_pages.shape[0] * cache.layout.block_tokens, device=cache.code_pages.device)
    records = records_at(cache, slots, kv)
    records[..., SCALE_BYTES + ENTRY_BYTES * first :] = 0
    store_records(cache.code_pages, cache.layout, kv, slots, records)


def residual_energy(cache: LayerCache, slots: Tensor, vectors: Tensor, kv: str) -> Tensor:
    """Energy float64 [M, Hk] that the records at these slots leave of the vectors [M, Hk, D], stretch taken off."""
    book, records = cache.codebook(kv), records_at(cache, slots, kv)
    back = decode_heads(records, book, cache.layout, kv, cache.tail_pages.dtype)
    return ((back.double() - vectors.double()) / book.stretch).square().sum(-1)


def check_gain(encode: Callable[..., None], layout: CodeLayout, device: str, dtype: torch.dtype, atoms: int) -> None:
    """A gain changes no entry of the records that `encode` makes, and the scales by what the twin says."""
    count = 32
    plain = poisoned_cache(layout, 2 + count // layout.block_tokens, atoms=atoms, dtype=dtype, device=device)
    raised = raised_cache(replace(plain, code_pages=plain.code_pages.clone()))
    tokens = fused_tokens(count, layout, dtype, device)
    source = torch.arange(count, device=device, dtype=torch.int32)
    slots = source.long() + layout.block_tokens
    for cache in (plain, raised):
        encode(*tokens, cache, source, slots)
    for kv, vectors in zip(KV, tokens, strict=True):
        before, after = (records_at(cache, slots, kv) for cache in (plain, raised))
        assert torch.equal(before[..., 2:], after[..., 2:])
        scales = [
            records[..., :2].contiguous().view(torch.bfloat16).double().squeeze(-1) for records in (before, after)
        ]
        book, got = raised.codebook(kv), scales[1] / scales[0]
        centred = (vectors.float() - book.mean) / book.stretch
        for head in range(layout.num_kv_heads):
            code = omp(centred[:, head], book.head(head).atoms[0].float(), layout.sparsity(kv))
            want = gain_factor(centred[:, head], *code, book.head(head)).double().squeeze(1)
            assert float((got[:, head] / want - 1).abs().mean()) < 0.01, (kv, got[:, head], want)
            assert float(got.std()) > 0.005, "gains that do not differ test nothing"


def check_encode(
    encode: Callable[..., None],
    layout: CodeLayout,
    count: int,
    device: str,
    dtype: torch.dtype = torch.float16,
    atoms: int = 130,
    relative_error: float = 0.0,
    with_fp8_atoms: bool = False,
) -> list[LayerCache]:
    """Code `count` tokens by the twin and by `encode`; returns both caches, the twin's first.

    Some vectors come from the tail, some jobs are skipped. Energies must agree both ways; what no job names must stay
    poison. with_fp8_atoms: `encode` chooses by atoms in fp8.
    """
    P, pages = layout.block_tokens, 10
    caches = [poisoned_cache(layout, pages, atoms=atoms, dtype=dtype, device=device) for _ in range(2)]
    if with_fp8_atoms:
        caches[1] = fp8_cache(caches[1])
    key, value = fused_tokens(count, layout, dtype, device)
    source = torch.arange(count, dtype=torch.int32)
    from_tail = source[::3][: 6 * layout.tail_tokens]
    slots = torch.arange(len(from_tail)) + layout.tail_tokens
    destination = torch.arange(count) + 2 * P + 3
    destination[1::7] = torch.tensor([-1, 0, P - 1]).repeat(count)[: len(destination[1::7])]
    for cache in caches:
        write_tail(key[from_tail.long()], value[from_tail.long()], cache, slots.to(device))
    source[from_tail.long()] = (-1 - slots).int()
    entries = source.to(device), destination.to(device)
    omp_encode(key, value, caches[0], *entries, relative_error=relative_error)
    encode(key, value, caches[1], *entries, relative_error=relative_error)
    kept = (destination >= P).to(device)
    for kv, vectors in (("key", key), ("value", value)):
        want, got = (residual_energy(cache, entries[1][kept], vectors[kept], kv) for cache in caches)
        assert got.isfinite().all()
        if layout.codec == "exact":
            assert float(got.sum()) == float(want.sum()) == 0
        else:
            assert float(got.sum()) <= OMP_ENERGY_RATIO["few"] * float(want.sum())
            assert float(want.sum()) <= OMP_ENERGY_RATIO["few"] * float(got.sum())
    # What the twin left alone, the kernel left alone.
    assert torch.equal(caches[0].code_pages[:2], caches[1].code_pages[:2])
    skipped = torch.arange(2 * P, pages * P)
    skipped = skipped[~torch.isin(skipped, destination)].to(device)
    for cache in caches:
        assert all((records_at(cache, skipped, kv) == 0xFF).all() for kv in KV)
        assert (cache.code_pages[:, layout.page_bytes :] == 0xFF).all()
    return caches
