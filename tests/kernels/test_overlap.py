"""Kernels that start before the one before them has ended: how they are launched, and what is compiled."""

from types import SimpleNamespace

import pytest
import torch
from lexico_kernels import CodeLayout
from lexico_kernels.device import launch, nvrtc
from lexico_kernels.device.overlap import launch_options, overlap_on
from lexico_kernels.sparse_decode import lookup, lookup_sizes
from lexico_kernels.testing import poisoned_cache

LIMITS = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100a": 227 << 10, "sm_120a": 99 << 10}  # bytes of a block
WAIT, TRIGGER = "griddepcontrol.wait;", "griddepcontrol.launch_dependents;"


@pytest.fixture
def calls(monkeypatch):
    """What a driver that is not there was called with, by its functions' names."""
    driver = pytest.importorskip("cuda.bindings.driver")
    found = []
    for name in ("cuLaunchKernel", "cuLaunchKernelEx"):
        monkeypatch.setattr(
            driver, name, lambda *args, name=name: (found.append((name, args)), (driver.CUresult(0),))[1]
        )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=7))
    return found


def test_a_launch_has_the_attribute_where_it_is_asked_for(calls):
    from cuda.bindings.driver import CUlaunchAttributeID

    kernel = nvrtc.Kernel("function", 0, 1000)
    kernel.launch((3, 4, 5), 96, torch.zeros(1), 2)
    kernel.launch((3, 4, 5), 96, torch.zeros(1), 2, overlaps=True)
    (plain, args), (with_attribute, (config, function, pointers, extra)) = calls
    assert plain == "cuLaunchKernel" and args[:9] == ("function", 3, 4, 5, 96, 1, 1, 1000, 7)
    assert with_attribute == "cuLaunchKernelEx" and (function, extra) == ("function", 0) and pointers
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == (3, 4, 5)
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == (96, 1, 1)
    assert (config.sharedMemBytes, int(config.hStream), config.numAttrs) == (1000, 7, 1)
    (attribute,) = config.attrs
    assert attribute.id == CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert attribute.value.programmaticStreamSerializationAllowed == 1


@pytest.mark.parametrize("overlap", [False, True])
def test_codes_are_attended_by_a_kernel_that_waits_if_it_is_launched_so(overlap, calls, monkeypatch):
    monkeypatch.setattr(lookup, "overlap_on", lambda _: overlap)
    monkeypatch.setattr(lookup, "shared_limit_bytes", lambda _: LIMITS["sm_90a"])
    compiled = []
    monkeypatch.setattr(
        nvrtc, "kernel", lambda *_, **macros: (compiled.append(macros), nvrtc.Kernel("function", 0, 0))[1]
    )
    cache = poisoned_cache(CodeLayout(64, 2, 5, 4), 3, atoms=64, dtype=torch.float16)
    shape = lookup_sizes.shape_for(cache.layout, 8, 64, 64, 512, LIMITS["sm_90a"])
    scratch = {name: torch.empty(1) for name in shape.scratch()}
    request, tables = torch.zeros(1, dtype=torch.int32), SimpleNamespace(block_table=torch.zeros(1, 4).int())
    lookup.kernel_for.cache_clear()
    lookup.attend_codes(shape, scratch, cache, tables, request)
    lookup.kernel_for.cache_clear()
    assert [called for called, _ in calls] == ["cuLaunchKernelEx" if overlap else "cuLaunchKernel"]
    assert compiled[0]["OVERLAPS"] == overlap


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kernel", ["attend_codes", "multiply_bins"])
@pytest.mark.parametrize("arch", LIMITS)
def test_cuda_kernels_compile_and_wait_where_devices_can(arch, kernel, overlap, monkeypatch):
    bindings = pytest.importorskip("cuda.bindings.nvrtc")
    limit = LIMITS[arch]
    shape = lookup_sizes.shape_for(CodeLayout(128, 2, 15, 15), 8, 4096, 4096, 1 << 17, limit)
    if kernel == "attend_codes":
        files, loads = lookup.FILES, 2  # levels alone
        macros = lookup_sizes.constants(shape, limit, overlap)
    else:
        files, loads = lookup.BINS_FILES, 0  # atoms come by copies
        macros = lookup_sizes.bins_constants(shape, lookup_sizes.bins_way(shape, 8, limit), False, overlap)
    source = nvrtc.source_text(files)
    assert nvrtc.compile_source(source, arch, macros).startswith(b"\x7fELF")
    monkeypatch.setattr(bindings, "nvrtcGetCUBINSize", bindings.nvrtcGetPTXSize)
    monkeypatch.setattr(bindings, "nvrtcGetCUBIN", bindings.nvrtcGetPTX)
    options = [*nvrtc.OPTIONS, f"--gpu-architecture={arch.replace('sm', 'compute')}"]
    options += [f"-D{macro}={value}" for macro, value in macros.items()]
    ptx = nvrtc.run_compiler(source, options).decode()
    can = arch != "sm_80"
    assert ptx.count(WAIT) == ptx.count(TRIGGER) == (can and overlap)
    if can and overlap:  # nothing of what steps write is read or written before
        before = ptx[: ptx.index(WAIT)]
        assert before.count("ld.global") == loads and "st.global" not in before


def test_what_may_overlap():
    assert launch.OVERLAP and not overlap_on(torch.zeros(1))
    assert launch_options(False) == {} and launch_options(True) == {"launch_pdl": True}
