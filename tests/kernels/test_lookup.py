"""Decoding through lookups against the twin, and the compilation of its step in CUDA C++."""

import ctypes
import functools
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from lexico_kernels import CodeLayout, reference
from lexico_kernels.device import nvrtc
from lexico_kernels.device.launch import LOOKUP_BINS, LOOKUP_MATMUL, LOOKUP_SPLITS, lookup_launch
from lexico_kernels.sparse_decode import lookup, lookup_sizes
from lexico_kernels.testing import assert_close, clear_entries, random_problem

P = 64
SHARED_BYTES = 232448  # of a thread block on sm_90

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy, on inf and NaN


def cut_contexts(monkeypatch, tokens):
    """Splits of at most so many tokens, a multiple of the threads."""
    splits = LOOKUP_SPLITS._replace(tokens=tokens, fewer_tokens=(tokens,), short_context=tokens, short_tokens=tokens)
    for module in (lookup_sizes, lookup):
        monkeypatch.setattr(module, "LOOKUP_SPLITS", splits)
    forget_shapes()


def forget_shapes():
    for cached in (
        lookup_sizes.way_for,
        lookup_sizes.shape_for,
        lookup_sizes.bins_way,
        lookup._lookup_tiles,
        lookup._merge_tiles,
    ):
        cached.cache_clear()


class OnCpu:
    """A kernel as `cuda_on_cpu.h` runs its source, thread by thread; what it should write is NaN before.

    written: which of its arguments it writes.
    """

    def __init__(self, folder, cpp, files, macros, shared_bytes, written):
        self.shared_bytes, self.written = shared_bytes, written
        source, path = folder / "source.cu", folder / "kernel.so"
        source.write_text("\n".join((nvrtc.SOURCES / file).read_text() for file in files))
        flags = [f"-D{name}={value}" for name, value in macros.items()]
        flags += [f'-DSOURCE="{source}"', "-DHALF=1", "-std=c++17", "-O1", "-w"]
        flags += ["-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, Path(__file__).parent / cpp, "-o", path], check=True)
        self.library = ctypes.CDLL(str(path))

    def launch(self, grid, threads, *arguments, overlaps):
        assert not overlaps
        for at in self.written:
            arguments[at].fill_(torch.nan)
        kinds = {
            torch.Tensor: lambda x: ctypes.c_void_p(x.data_ptr()),
            nvrtc.Int64: ctypes.c_longlong,
            int: ctypes.c_int,
        }
        self.library.launch(*grid[:2], self.shared_bytes, *(kinds[type(each)](each) for each in arguments))


@pytest.fixture(scope="module")
def kernels_on_cpu(tmp_path_factory):
    """Both kernels for each shape, built once."""

    def attend_codes(shape, *_):
        shared = lookup_sizes.shared_bytes(shape.queries, shape.key_atoms, shape.value_atoms, shape.way)
        macros = lookup_sizes.constants(shape, SHARED_BYTES)
        folder = tmp_path_factory.mktemp("lookup")
        return OnCpu(folder, "lookup_on_cpu.cpp", lookup.FILES[1:], macros, shared, (10, 11))

    def multiply_bins(shape, way, half, *_):
        macros = lookup_sizes.bins_constants(shape, way, half)
        shared = lookup_sizes.bins_shared_bytes(shape, way)
        folder = tmp_path_factory.mktemp("bins")
        return OnCpu(folder, "multiply_bins_on_cpu.cpp", lookup.BINS_FILES[1:], macros, shared, (5,))

    return functools.cache(attend_codes), functools.cache(multiply_bins)


@pytest.fixture
def on_any_device(monkeypatch, device, kernels_on_cpu):
    """The whole path on a GPU; on a CPU its steps in Triton by the interpreter, with blocks of 64 threads."""
    if device == "cpu":
        if not shutil.which("g++"):
            pytest.skip("needs g++")
        for module in (lookup_sizes, lookup):
            monkeypatch.setattr(module, "lookup_launch", lambda queries: lookup_launch(queries)._replace(threads=64))
        cut_contexts(monkeypatch, 256)
        for name, kernel in zip(("kernel_for", "bins_kernel_for"), kernels_on_cpu, strict=True):
            monkeypatch.setattr(lookup, name, kernel)
        monkeypatch.setattr(lookup, "shared_limit_bytes", lambda _: SHARED_BYTES)
    yield
    forget_shapes()


def check(problem, request, lengths, heads, device, dtype=torch.float16, soft_cap=0.0, sinks=None):
    request = torch.tensor(request, dtype=torch.int32, device=device)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(9)
    query = torch.randn(len(lengths), heads, problem.cache.layout.head_dim, generator=generator).to(device, dtype)
    args = (query, problem.cache, problem.tables, request, lengths)
    want, want_lse = reference.sparse_decode(*args, scale=0.1, soft_cap=soft_cap, sinks=sinks)
    out = torch.full((*query.shape[:2], 2 * query.shape[2]), torch.nan, dtype=dtype, device=device)
    out = out[..., : query.shape[2]]
    given, lse = lookup.sparse_decode(*args, scale=0.1, out=out, soft_cap=soft_cap, sinks=sinks)
    assert given is out
    assert_close(out, want, "attention", dtype)
    assert_close(lse, want_lse, "lse", dtype)
    return out, lse


def layout(D=64, Hk=2, S=(5, 4)):
    return CodeLayout(D, Hk, *S, block_tokens=P)


@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_lengths(group, device, on_any_device):
    lengths = [1, P - 1, P, P + 1, 63, 0]
    problem = random_problem(layout(), lengths, atoms=40, device=device)
    check(problem, range(6), lengths, 2 * group, device)


@pytest.mark.parametrize("at_once", [2, 16])
def test_several_splits(at_once, device, on_any_device, monkeypatch):
    """More than are loaded at once, and fewer."""
    monkeypatch.setattr(lookup_sizes, "LOOKUP_BINS_SPLITS", at_once)
    if device == "cpu":
        cut_contexts(monkeypatch, 64)
    forget_shapes()
    lengths = [333, 40, 90]
    problem = random_problem(layout(), lengths, atoms=64, device=device, raw_tokens=40)
    check(problem, range(3), lengths, 4, device)


def test_unused_entries_have_no_bin(device, on_any_device, monkeypatch):
    """They all name the null atom, whose bin could overflow and come out as infinity."""
    problem = random_problem(layout(S=(5, 15)), [63, 40], atoms=64, device=device, sink_pages=0, raw_tokens=0)
    clear_entries(problem.cache, "value", 2)
    bins, multiply = [], lookup.multiply_bins

    def watched(shape, scratch, *rest):
        bins.append(scratch["bins"].view(-1, shape.value_atoms)[:, 0].clone())
        multiply(shape, scratch, *rest)

    monkeypatch.setattr(lookup, "multiply_bins", watched)
    check(problem, range(2), [63, 40], 8, device)
    assert len(bins) == 1 and not bins[0].any()


@pytest.mark.parametrize(
    ("D", "S", "group"),
    [(128, (7, 3), 2), (96, (4, 15), 2), (80, (9, 9), 6), (112, (13, 13), 2), (192, (11, 23), 4), (256, (31, 31), 8)],
)
def test_shapes(D, S, group, device, on_any_device):
    problem = random_problem(layout(D, 1, S), [130], atoms=100, device=device, raw_tokens=40)
    check(problem, [0], [130], group, device)


def test_soft_cap(device, on_any_device):
    """Of scores most of which it changes; those of codes have their keys' mean by then."""
    problem = random_problem(layout(), [130], atoms=64, device=device, raw_tokens=40)
    _, lse = check(problem, [0], [130], 8, device, soft_cap=0.7)
    assert (lse < math.log(130) + 0.7).all()  # no score is above the cap


def test_learned_sinks(device, on_any_device):
    problem = random_problem(layout(), [130], atoms=64, device=device, raw_tokens=40)
    check(problem, [0, 0], [130, 0], 8, device, sinks=torch.linspace(-2, 8, 8, device=device))


def test_more_query_heads_than_one_pass_serves(device, on_any_device):
    problem = random_problem(layout(), [63], atoms=64, device=device)
    assert lookup_sizes.way_for(12, 64, 64, SHARED_BYTES).passes == 3
    check(problem, [0], [63], 24, device)


@pytest.mark.parametrize(("group", "passes", "binned"), [(7, 1, 4), (4, 1, 2), (5, 2, 2)])
def test_less_shared_memory(group, passes, binned, device, on_any_device, monkeypatch):
    """Bins of some heads at a time, which give the bits of all at once, and passes that do not divide a group."""
    if device == "cpu":
        cut_contexts(monkeypatch, 64)
    atoms, limits = (100, range(6272, 16384, 64)) if device == "cpu" else (4096, range(32768, 232448, 256))
    problem = random_problem(layout(), [130], atoms=atoms, device=device, raw_tokens=40)
    want = check(problem, [0], [130], 2 * group, device)
    ways = {limit: lookup_sizes.way_for(group, atoms, atoms, limit) for limit in limits}
    limit = next(limit for limit, way in ways.items() if way and way[:2] == (passes, binned))
    monkeypatch.setattr(lookup, "shared_limit_bytes", lambda _: limit)
    monkeypatch.setattr(lookup_sizes, "bins_fit", lambda *_: True)  # has no room for a tile of 100 atoms
    forget_shapes()
    given = check(problem, [0], [130], 2 * group, device)
    if passes == 1:  # of other rows, products with the atoms may be added up in another order
        assert all(torch.equal(one, other) for one, other in zip(want, given, strict=True))


@pytest.mark.parametrize(("sink_pages", "raw_tokens"), [(0, 0), (0, 500), (3, 0), (50, 0)])
def test_ranges(sink_pages, raw_tokens, device, on_any_device):
    """No sinks, no tail, nothing coded, everything a sink; and several tokens of a request."""
    problem = random_problem(layout(), [63, 33], atoms=64, device=device, sink_pages=sink_pages, raw_tokens=raw_tokens)
    check(problem, [0, 0, 1, 1], [62, 63, 33, 0], 4, device)


def test_slices_give_the_same_bits(device, on_any_device, monkeypatch):
    problem = random_problem(layout(), [63, 40, 33], atoms=64, device=device)
    whole = check(problem, range(3), [63, 40, 33], 4, device)
    monkeypatch.setattr(lookup_sizes, "LOOKUP_SCRATCH_BYTES", 1)
    sliced = check(problem, range(3), [63, 40, 33], 4, device)
    assert all(torch.equal(one, other) for one, other in zip(whole, sliced, strict=True))


def test_without_tokens(device, on_any_device):
    problem = random_problem(layout(), [5], atoms=64, device=device)
    empty = torch.zeros(0, dtype=torch.int32, device=device)
    query = torch.zeros(0, 4, 64, dtype=torch.float16, device=device)
    out, lse = lookup.sparse_decode(query, problem.cache, problem.tables, empty, empty, scale=1.0)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_splits_are_never_more_than_the_grid_has():
    for tokens in [*range(1, 9000, 97), 8192, 8193, 131072, 1 << 20]:
        sizes = LOOKUP_SPLITS
        size = sizes.short_tokens if tokens <= sizes.short_context else sizes.tokens
        assert -(-tokens // size) <= lookup_sizes.max_splits(tokens, sizes.tokens)


GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16)


@pytest.mark.parametrize(
    ("limit", "passes"),
    [
        (227 << 10, (1, 1, 1, 1, 1, 1, 1, 2, 3, 4)),
        (163 << 10, (1, 1, 1, 1, 1, 1, 1, 2, 3, 4)),
        (99 << 10, (1, 1, 1, 1, 2, 2, 2, 2, 3, 4)),
        (1 << 10, (0,) * 10),
    ],
)
def test_query_heads_of_a_pass_fit_shared_memory(limit, passes):
    for group, want in zip(GROUPS, passes, strict=True):
        way = lookup_sizes.way_for(group, 4096, 4096, limit)
        assert (way.passes if way else 0) == want, group
        if way:
            queries = -(-group // way.passes)
            used = lookup_sizes.shared_bytes(queries, 4096, 4096, way)
            assert used + LOOKUP_SPLITS.static_bytes <= limit
            assert 1 <= way.binned <= queries
            assert limit < 200 << 10 or way == (way.passes, queries, LOOKUP_SPLITS.tokens)  # Hopper needs no other way


CASES = [  # query heads per KV head, D, sparsities, atoms
    (1, 128, (15, 15), (4096, 4096)),
    (2, 128, (15, 7), (4096, 4096)),
    (3, 128, (11, 11), (4096, 4096)),
    (4, 128, (15, 15), (4096, 4096)),
    (4, 128, (16, 14), (4096, 4096)),
    (4, 128, (7, 7), (4096, 1024)),
    (4, 64, (10, 9), (1000, 333)),
    (5, 128, (23, 31), (4096, 4096)),
    (6, 128, (15, 15), (4096, 4096)),
    (7, 64, (15, 15), (4096, 4096)),
    (8, 128, (3, 1), (1, 40)),
    (8, 256, (31, 31), (4096, 4096)),  # Qwen3-Next at an eighth of its bytes
]


LIMITS = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90a": SHARED_BYTES}  # of shared memory for a block


COMPILED = [(arch, case) for arch in ("sm_80", "sm_90a") for case in CASES]
COMPILED += [("sm_89", case) for case in CASES if case[:2] in ((4, 128), (5, 128))]


@pytest.mark.parametrize(("arch", "case"), COMPILED, ids=str)
def test_the_kernel_compiles(arch, case):
    """To machine code, without a GPU."""
    pytest.importorskip("cuda.bindings.nvrtc")
    group, D, S, atoms = case
    it = CodeLayout(D, 2, *S)
    limit = LIMITS[arch]
    shape = lookup_sizes.shape_for(it, 2 * group, *atoms, 1 << 17, limit)
    macros = lookup_sizes.constants(shape, limit)
    assert nvrtc.compile_source(nvrtc.source_text(lookup.FILES), arch, macros).startswith(b"\x7fELF")


@pytest.mark.parametrize("tokens", [1, 8, 256])
@pytest.mark.parametrize(("arch", "case"), COMPILED, ids=str)
def test_products_with_the_atoms_compile(arch, case, tokens):
    """To machine code, without a GPU; and fit shared memory whatever the context."""
    pytest.importorskip("cuda.bindings.nvrtc")
    group, D, S, atoms = case
    for context in (1 << 17, 1 << 20):
        shape = lookup_sizes.shape_for(CodeLayout(D, 2, *S), 2 * group, *atoms, context, LIMITS[arch])
        way = lookup_sizes.bins_way(shape, tokens, LIMITS[arch])
        assert lookup_sizes.bins_shared_bytes(shape, way) <= LIMITS[arch] and way.columns % shape.row == 0
    macros = lookup_sizes.bins_constants(shape, way, half=tokens == 1)
    assert nvrtc.compile_source(nvrtc.source_text(lookup.BINS_FILES), arch, macros).startswith(b"\x7fELF")


def test_the_kernel_compiles_with_a_soft_cap():
    """As Gemma 2's: 50 in base e."""
    pytest.importorskip("cuda.bindings.nvrtc")
    it = CodeLayout(256, 2, 31, 31)
    shape = lookup_sizes.shape_for(it, 4, 4096, 4096, 1 << 17, SHARED_BYTES, 50 * lookup.LOG2_E)
    macros = lookup_sizes.constants(shape, SHARED_BYTES)
    assert macros["CAP_BITS"] == nvrtc.float_bits(72.13475)
    assert nvrtc.compile_source(nvrtc.source_text(lookup.FILES), "sm_90a", macros).startswith(b"\x7fELF")


def test_what_does_not_fit_goes_another_way():
    """Heads of 256 with 99 KiB: contexts of over 400 splits, and any of over 2,048."""
    it = CodeLayout(256, 1, 31, 31)
    assert lookup_sizes.shape_for(it, 2, 4096, 4096, 1 << 20, LIMITS["sm_89"]) is not None
    assert lookup_sizes.shape_for(it, 2, 4096, 4096, 1 << 22, LIMITS["sm_89"]) is None
    assert lookup_sizes.shape_for(CodeLayout(64, 1, 15, 15), 2, 4096, 4096, 1 << 24, SHARED_BYTES) is None


def test_columns_hold_whole_tokens():
    for columns in (LOOKUP_MATMUL.columns, *(row.columns for row in LOOKUP_BINS)):
        assert columns % lookup_sizes.MAX_QUERIES == 0


def test_scratch_is_bounded_and_covers_what_is_taken():
    it = CodeLayout(128, 8, 15, 15)
    for tokens in (1, 16, 1024):
        for context in (2048, 131072, 1 << 20):
            reserved = lookup_sizes.scratch_bytes(it, 32, tokens, context)
            shape = lookup_sizes.shape_for(it, 32, 4096, 1024, context, SHARED_BYTES)
            assert min(tokens, shape.slice_tokens()) * shape.token_bytes() <= reserved
            assert reserved <= max(lookup_sizes.LOOKUP_SCRATCH_BYTES, lookup_sizes.scratch_bytes(it, 32, 1, context))
