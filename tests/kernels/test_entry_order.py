"""The order of entries: what the kernel makes of records, worked out again in plain Python, and what it is for.

On a CPU `cuda_on_cpu.h` runs the kernel's source thread by thread.
"""

import ctypes
import functools
import hashlib
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lexico_kernels import CodeLayout, LayerStack
from lexico_kernels.device import nvrtc
from lexico_kernels.memory.layout import KV
from lexico_kernels.memory.records import store_records
from lexico_kernels.omp_encode import entry_order as order
from lexico_kernels.sparse_decode import lookup
from lexico_kernels.testing import entries_at, poisoned_cache, random_records, records_at

FOLDER = Path(__file__).parent
LIMIT_BYTES = 232448  # of a block's shared memory
HALVES = [range(16), range(16, 32)]
QUARTERS = [range(first, first + 8) for first in range(0, 32, 8)]
ALL = [range(32)]
# By query heads per KV head: the lanes that can meet in a bank of keys (16 goes in four passes). Of values all can.
KEY_SETS = {1: ALL, 2: ALL, 3: HALVES, 4: HALVES, 6: QUARTERS, 16: HALVES}


def sets_of(kv, group):
    return KEY_SETS[group] if kv == "key" else ALL


class OnCpu:
    """Stands in for `nvrtc.Kernel`: the same source, compiled by g++."""

    def __init__(self, folder, macros):
        source = folder / "source.cu"
        source.write_text("\n".join((nvrtc.SOURCES / file).read_text() for file in order.FILES))
        flags = [f"-D{name}={value}" for name, value in sorted(macros)]
        flags += [f'-DSOURCE="{source}"', "-DHALF=0", "-std=c++17", "-O1", "-w"]
        flags += ["-U_FORTIFY_SOURCE", "-shared", "-fPIC"]
        path = folder / f"{hashlib.sha256(' '.join(flags).encode()).hexdigest()[:16]}.so"
        subprocess.run(["g++", *flags, FOLDER / "entry_order_on_cpu.cpp", "-o", path], check=True)
        self.library = ctypes.CDLL(str(path))

    def launch(self, grid, threads, pages, addresses, stride, destination, count):
        tensors = (pages, addresses, destination)
        pages, addresses, destination = (
            ctypes.c_void_p(tensor.data_ptr() if isinstance(tensor, torch.Tensor) else 0) for tensor in tensors
        )
        self.library.launch(*grid, threads, pages, addresses, ctypes.c_longlong(stride), destination, count)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    """The kernel for some macros, built once."""
    folder = tmp_path_factory.mktemp("entry_order")
    return functools.cache(lambda macros: OnCpu(folder, macros))


@pytest.fixture
def order_entries(device, monkeypatch, on_cpu):
    """The kernel, on a CPU where there is no GPU."""
    if device == "cuda":
        if not nvrtc.available(0):
            pytest.skip("CUDA C++ cannot be compiled here")
        return order.order_entries
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    monkeypatch.setattr(nvrtc, "kernel", lambda files, name, device, **macros: on_cpu(tuple(macros.items())))
    monkeypatch.setattr(lookup, "shared_limit_bytes", lambda _: LIMIT_BYTES)
    order.kernel_for.cache_clear()
    return order.order_entries


def filled(layout, device, atoms=4096):
    """A cache whose pages 1 to 3 have random records."""
    cache = poisoned_cache(layout, 5, atoms=64, dtype=torch.float16, device=device)
    P, generator = layout.block_tokens, torch.Generator().manual_seed(4)
    for kv in KV:
        records = random_records(3 * P, layout, kv, atoms, torch.float16, generator).to(device)
        store_records(cache.code_pages, layout, kv, torch.arange(P, 4 * P, device=device), records)
    return cache


def entries(cache, slots, kv):
    """int [M, Hk, S]."""
    return entries_at(cache, slots, kv).int().cpu() & 0xFFFF


def first_from(numbers, start):
    """The lowest that is no less than `start`, else the lowest."""
    return min(numbers, key=lambda number: (number < start, number))


class Matching:
    """A position's, of a set's tokens with classes; as `entry_order.cu` finds it, by its names."""

    def __init__(self, open_classes, rotation):
        self.open, self.rotation, self.count = open_classes, rotation, [0] * len(open_classes)
        self.of = [None] * len(open_classes)

    def fill_needs(self, need):
        for kind, wanted in enumerate(need):
            for _ in range(wanted):
                able = [t for t, kinds in enumerate(self.open) if self.of[t] is None and kind in kinds]
                if not able:
                    break
                self.of[first_from(able, self.rotation)] = kind
                self.count[kind] += 1

    def choose(self, limit):
        room, chosen = {kind for kind, count in enumerate(self.count) if count < limit}, {}
        for token, kinds in enumerate(self.open):
            if self.of[token] is None and kinds & room:
                start = (token + self.rotation) % len(self.of)
                chosen.setdefault(first_from(kinds & room, start), token)
        for kind, token in chosen.items():
            self.of[token] = kind
            self.count[kind] += 1

    def place(self, token, limit):
        """Whether there is a class for the token."""
        parents, searched = dict.fromkeys(self.open[token], token), set()
        while not (hit := {kind for kind in parents if self.count[kind] < limit}):
            others = [t for t, kind in enumerate(self.of) if kind in parents and t not in searched]
            if not others:
                return False
            searched.add(others[0])
            parents |= dict.fromkeys(self.open[others[0]] - parents.keys(), others[0])
        to = first_from(hit, self.rotation)
        self.count[to] += 1
        while to is not None:
            mover = parents[to]
            self.of[mover], to = to, self.of[mover]
        return True


def matched(open_classes, rotation, most, need):
    """A matching with as many tokens of a class as must be, and whether it is one of each where that was asked for."""
    match, limit = Matching(open_classes, rotation), most
    match.fill_needs(need if most > 1 else [])
    for _ in range(3):
        match.choose(limit)
    while None in match.of:
        if match.place(match.of.index(None), limit):
            continue
        if most == 1:
            return None
        limit += 1
    return match


def ordered(span, sets, shift=0):
    """The rule, for one head's entries [32, S]."""
    out, S = span.clone(), span.shape[1]
    for tokens in sets:
        size, singly = len(tokens), True
        left = [[(entry, (entry >> 4 >> shift) % size) for entry in span[token].tolist()] for token in tokens]
        for at in range(S):
            later, kinds = S - at - 1, [{kind for _, kind in entries} for entries in left]
            counts = [sum(kind == own for entries in left for _, own in entries) for kind in range(size)]
            need = [min(2, max(0, count - 2 * later)) for count in counts]
            match = None
            if singly and max(counts) - 1 <= 2 * later:
                match = matched(kinds, at % size, 1, need)
                singly = match is not None
            match = match or matched(kinds, at % size, 2, need)
            for token, entries, kind in zip(tokens, left, match.of, strict=True):
                entry = next(entry for entry in entries if entry[1] == kind)
                entries.remove(entry)
                out[token, at] = entry[0]
    return out


def delay(span, kv, group=4):
    """Mean over positions of how many lanes meet in the fullest bank, over sets; equal words of keys count as one."""
    sets, total, shift = sets_of(kv, group), 0, 5 if kv == "key" and group == 1 else 4  # rows of a word or more
    for at in range(span.shape[1]):
        fullest = []
        for tokens in sets:
            atoms = (span[list(tokens), at] >> shift).tolist()
            atoms = list(set(atoms)) if kv == "key" else atoms
            size = len(tokens)
            fullest.append(max(sum(atom % size == kind for atom in atoms) for kind in range(size)))
        total += sum(fullest) if kv == "key" else max(fullest)
    return total / span.shape[1]


@pytest.mark.parametrize(
    ("S", "P", "group"), [((15, 15), 64, 4), ((7, 31), 32, 6), ((1, 2), 128, 1), ((5, 5), 64, 2), ((9, 3), 64, 3)]
)
def test_order(S, P, group, device, order_entries):
    it = CodeLayout(64, 2, *S, block_tokens=P)
    cache, before = (replace(filled(it, device), group=group) for _ in range(2))
    # Two spans end here; one token is skipped, one span has no end, and some are listed where no span is whole.
    slots = torch.cat((torch.arange(P, P + 32), torch.arange(3 * P - 32, 3 * P), torch.arange(3 * P, 3 * P + 20)))
    slots[3] = -1
    order_entries(cache, slots.to(device))
    for kv in KV:
        for first in (P, 3 * P - 32):
            at = torch.arange(first, first + 32, device=device)
            old, new = entries(before, at, kv), entries(cache, at, kv)
            for head in range(2):
                assert torch.equal(new[:, head], ordered(old[:, head], sets_of(kv, group), kv == "key" and group == 1))
            assert torch.equal(new.sort(-1).values, old.sort(-1).values)
            records = records_at(before, at, kv)
            records[..., 2:] = records_at(cache, at, kv)[..., 2:]
            store_records(before.code_pages, it, kv, at, records)
    assert torch.equal(cache.code_pages, before.code_pages)  # nothing else was touched


def test_all_layers_are_ordered_as_each_is(device, order_entries):
    it = CodeLayout(64, 2, 7, 5, block_tokens=64)
    each, at_once = ([filled(it, device, atoms) for atoms in (4096, 100, 50)] for _ in range(2))
    slots = torch.arange(64, 96, device=device)
    for cache in each:
        order_entries(cache, slots)
    order.order_entries_layers(LayerStack.of(at_once), slots)
    for one, other, old in zip(each, at_once, (filled(it, device, atoms) for atoms in (4096, 100, 50)), strict=True):
        assert torch.equal(one.code_pages, other.code_pages) and not torch.equal(one.code_pages, old.code_pages)


@pytest.mark.parametrize("group", [4, 6])
def test_common_atoms_and_empty_entries(group, device, order_entries):
    """As real codes are: a few atoms in most records, and entries that are not used."""
    it = CodeLayout(64, 2, 15, 15, block_tokens=64)
    cache = replace(filled(it, device), group=group)
    slots, generator = torch.arange(64, 256, device=device), torch.Generator().manual_seed(6)
    for kv in KV:
        rare = torch.randint(1, 4096, (192, 2, 15), generator=generator)
        common = torch.tensor([8, 16, 24, 40, 72])[torch.randint(0, 5, (192, 2, 15), generator=generator)]
        atoms = torch.where(torch.rand(192, 2, 15, generator=generator) < 0.5, common, rare)
        atoms[torch.rand(192, 2, 15, generator=generator) < 0.2] = 0
        records = records_at(cache, slots, kv)
        bits = (atoms * 16 + torch.randint(0, 16, atoms.shape, generator=generator)).to(torch.int32)
        packed = torch.stack((bits % 256, bits // 256), -1).to(torch.uint8).flatten(-2)
        records[..., 2:] = packed.to(device)
        store_records(cache.code_pages, it, kv, slots, records)
    before = {kv: entries(cache, slots, kv) for kv in KV}
    order_entries(cache, slots)
    for kv in KV:
        after = entries(cache, slots, kv)
        assert torch.equal(after.sort(-1).values, before[kv].sort(-1).values)
        for first in range(0, 192, 32):
            span = slice(first, first + 32)
            assert torch.equal(after[span, 1], ordered(before[kv][span, 1], sets_of(kv, group)))


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [(4, (5.7, 3.2), (3.3, 1.75)), (6, (10, 6.1), (3.3, 1.75)), (1, (3.2, 1.75), (3.3, 1.75))],
)
def test_fewer_lanes_meet(group, key, value, device, order_entries):
    """Random atoms, S = 15: at least so many cycles of an instruction before, at most so many after."""
    it = CodeLayout(64, 2, 15, 15, block_tokens=64)
    cache = replace(filled(it, device), group=group)
    spans = torch.arange(64, 4 * 64, device=device).view(-1, 32)
    old = {kv: sum(delay(entries(cache, at, kv)[:, 0], kv, group) for at in spans) / len(spans) for kv in KV}
    order_entries(cache, spans.flatten())
    new = {kv: sum(delay(entries(cache, at, kv)[:, 0], kv, group) for at in spans) / len(spans) for kv in KV}
    for kv, (least, most) in zip(KV, (key, value), strict=True):
        assert old[kv] > least and new[kv] < most, (kv, old[kv], new[kv])


@pytest.mark.parametrize("group", KEY_SETS)
def test_lanes_that_meet(group):
    """By the rows of `lookup.cu`."""
    found = order.key_sets(group, 4096, 4096, LIMIT_BYTES)
    size = found["KEY_SET"]
    assert [range(start, start + size) for start in range(0, 32, size)] == KEY_SETS[group]
    assert found["KEY_SHIFT"] == (group == 1)


def test_one_class_takes_whatever_must_be(device, order_entries):
    """All atoms in one bank: every position has all tokens of a set in it."""
    it = CodeLayout(64, 1, 2, 2, block_tokens=32)
    cache = filled(it, device)
    for kv in KV:
        same = torch.tensor([0x00, 0x3F, 0x00, 0x10, 0x01, 0x20], dtype=torch.uint8, device=device)
        store_records(cache.code_pages, it, kv, torch.arange(32, 64, device=device), same.expand(32, 1, 6))
    before = entries(cache, torch.arange(32, 64, device=device), "key")
    order_entries(cache, torch.tensor([63], device=device))
    after = entries(cache, torch.arange(32, 64, device=device), "key")
    assert torch.equal(after[:, 0], ordered(before[:, 0], HALVES))
    assert torch.equal(after.sort(-1).values, before.sort(-1).values)
