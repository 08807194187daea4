"""The order of entries: what the kernel makes of records, worked out again in plain Python, and what it is for.

On a CPU `cuda_on_cpu.h` runs the kernel's source thread by thread.
"""

import ctypes
import functools
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from lexico_kernels import CodeLayout, LayerStack
from lexico_kernels.device import nvrtc
from lexico_kernels.memory.layout import KV
from lexico_kernels.memory.records import store_records
from lexico_kernels.omp_encode import entry_order as order
from lexico_kernels.testing import entries_at, poisoned_cache, random_records, records_at

FOLDER = Path(__file__).parent
SETS = {  # of lanes that can meet in a bank, and how many atoms in a row do not
    "key": ([range(16), range(16, 32)], 16),
    "value": ([range(first, 32, 4) for first in range(4)], 8),
}


class OnCpu:
    """Stands in for `nvrtc.Kernel`: the same source, compiled by g++."""

    def __init__(self, folder, layout):
        source = folder / "source.cu"
        source.write_text("\n".join((nvrtc.SOURCES / file).read_text() for file in order.FILES))
        flags = [f"-D{name}={value}" for name, value in sorted(order.macros(layout).items())]
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
    """The kernel for a layout, built once."""
    folder = tmp_path_factory.mktemp("entry_order")
    return functools.cache(lambda layout: OnCpu(folder, layout))


@pytest.fixture
def order_entries(device, monkeypatch, on_cpu):
    """The kernel, on a CPU where there is no GPU."""
    if device == "cuda":
        if not nvrtc.available(0):
            pytest.skip("CUDA C++ cannot be compiled here")
        return order.order_entries
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    monkeypatch.setattr(order, "_kernel", lambda device, layout: on_cpu(layout))
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


def ordered(span, kv):
    """The rule, for one head's entries [32, S]: each to the free place where fewest before it are of its class."""
    sets, addresses = SETS[kv]
    out, S = span.clone(), span.shape[1]
    for tokens in sets:
        counts = [[0] * addresses for _ in range(S)]
        for token in tokens:
            free = list(range(S))
            for entry in span[token].tolist():
                kind = (entry >> 4) % addresses
                best = min(free, key=lambda slot: (min(counts[slot][kind], 15), slot))
                free.remove(best)
                counts[best][kind] += 1
                out[token, best] = entry
    return out


def delay(span, kv):
    """Mean over positions of how many lanes meet in the fullest bank, by SETS; equal atoms of keys count as one."""
    sets, addresses = SETS[kv]
    total = 0
    for at in range(span.shape[1]):
        fullest = []
        for tokens in sets:
            atoms = (span[list(tokens), at] >> 4).tolist()
            atoms = list(set(atoms)) if kv == "key" else atoms
            fullest.append(max(sum(atom % addresses == kind for atom in atoms) for kind in range(addresses)))
        total += sum(fullest) if kv == "key" else max(fullest)
    return total / span.shape[1]


@pytest.mark.parametrize(("S", "P"), [((15, 15), 64), ((7, 31), 32), ((1, 2), 128)])
def test_order(S, P, device, order_entries):
    it = CodeLayout(64, 2, *S, block_tokens=P)
    cache, before = filled(it, device), filled(it, device)
    # Two spans end here; one token is skipped, one span has no end, and some are listed where no span is whole.
    slots = torch.cat((torch.arange(P, P + 32), torch.arange(3 * P - 32, 3 * P), torch.arange(3 * P, 3 * P + 20)))
    slots[3] = -1
    order_entries(cache, slots.to(device))
    for kv in KV:
        for first in (P, 3 * P - 32):
            at = torch.arange(first, first + 32, device=device)
            old, new = entries(before, at, kv), entries(cache, at, kv)
            for head in range(2):
                assert torch.equal(new[:, head], ordered(old[:, head], kv))
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


def test_fewer_lanes_meet(device, order_entries):
    """Random atoms, S = 15: positions where 6.1 and 3.3 lanes met have 4.1 and 2.1."""
    it = CodeLayout(64, 2, 15, 15, block_tokens=64)
    cache = filled(it, device)
    spans = torch.arange(64, 4 * 64, device=device).view(-1, 32)
    old = {kv: sum(delay(entries(cache, at, kv)[:, 0], kv) for at in spans) / len(spans) for kv in KV}
    order_entries(cache, spans.flatten())
    new = {kv: sum(delay(entries(cache, at, kv)[:, 0], kv) for at in spans) / len(spans) for kv in KV}
    assert old["key"] > 5.7 and new["key"] < 4.3 and old["value"] > 3.1 and new["value"] < 2.25


def test_equal_classes_overflow_nothing(device, order_entries):
    """All atoms in one bank: counters of four bits meet 16 tokens."""
    it = CodeLayout(64, 1, 2, 2, block_tokens=32)
    cache = filled(it, device)
    for kv in KV:
        same = torch.tensor([0x00, 0x3F, 0x00, 0x10, 0x01, 0x20], dtype=torch.uint8, device=device)
        store_records(cache.code_pages, it, kv, torch.arange(32, 64, device=device), same.expand(32, 1, 6))
    before = entries(cache, torch.arange(32, 64, device=device), "key")
    order_entries(cache, torch.tensor([63], device=device))
    after = entries(cache, torch.arange(32, 64, device=device), "key")
    assert torch.equal(after[:, 0], ordered(before[:, 0], "key"))
    assert torch.equal(after.sort(-1).values, before.sort(-1).values)
