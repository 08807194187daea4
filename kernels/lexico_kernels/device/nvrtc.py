"""CUDA C++ kernels of this package, compiled by NVRTC at first use and kept on disk.

PyTorch for CUDA depends on the two libraries that this needs, NVRTC and cuda-bindings, so users need no toolkit. A
source is a `.cu` file of `lexico_kernels` without includes; its `extern "C"` kernels get constants as macros.
"""

import ctypes
import logging
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lexico_kernels.device.kernel_files import kept

SOURCES = Path(__file__).parent.parent
MIN_CAPABILITY = (8, 0)
OPTIONS = ("--std=c++17", "--extra-device-vectorization")
# A kernel that does nothing: where it cannot be built and loaded, no other can.
PROBE = 'extern "C" __global__ void probe() {}'

logger = logging.getLogger(__name__)


class Int64(int):
    """An integer that a kernel takes as 64 bits; plain ones are passed as 32."""


def check(result: tuple[Any, ...]) -> Any:
    """What a call of cuda.bindings returned without its status; RuntimeError if that is an error."""
    status, *values = result
    if status.value:
        raise RuntimeError(f"CUDA says {status.name}")
    return values[0] if len(values) == 1 else values


def architecture(capability: tuple[int, int]) -> str:
    """The name of a device's own instruction set: sm_80, sm_90a."""
    major, minor = capability
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def compile_source(source: str, arch: str, defines: Mapping[str, int] | None = None) -> bytes:
    """Compile CUDA C++ to machine code, or take it from the disk if it was compiled before (`kernel_files`).

    Args:
        source: one translation unit.
        arch: as `architecture` names it.
        defines: macros.

    Returns:
        A CUBIN.

    Raises:
        RuntimeError: it does not compile; with the compiler's messages.
    """
    from cuda.bindings import nvrtc

    macros = [f"-D{name}={value}" for name, value in sorted((defines or {}).items())]
    options = [*OPTIONS, f"--gpu-architecture={arch}", *macros]
    identity = "\0".join([source, *options, *map(str, check(nvrtc.nvrtcVersion()))])
    return kept(identity, lambda: run_compiler(source, options))


def run_compiler(source: str, options: list[str]) -> bytes:
    """NVRTC's CUBIN of a source; RuntimeError with its messages if it does not compile."""
    from cuda.bindings import nvrtc

    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status.value:
            log = bytearray(check(nvrtc.nvrtcGetProgramLogSize(program)))
            check(nvrtc.nvrtcGetProgramLog(program, log))
            raise RuntimeError(f"NVRTC says {status.name} with {options}:\n{log.rstrip(bytes(1)).decode()}")
        cubin = bytearray(check(nvrtc.nvrtcGetCUBINSize(program)))
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel; make it with `kernel`."""

    function: Any  # CUfunction
    device: int
    shared_bytes: int

    def launch(
        self, grid: tuple[int, int, int], threads: int, *arguments: Tensor | int | float, overlaps: bool = False
    ) -> None:
        """Start it on torch's current stream.

        Args:
            grid: blocks.
            threads: per block.
            arguments: tensors are passed as pointers, integers as int, `Int64` as long long, floats as float.
            overlaps: it may start before the kernel before it has ended, and waits itself (`overlap.py`).
        """
        from cuda.bindings import driver

        signature = "".join(map(_code, arguments))
        packing, offsets = _layout(signature)
        values = [value.data_ptr() if isinstance(value, Tensor) else value for value in arguments]
        memory = ctypes.create_string_buffer(packing.pack(*values), packing.size)
        base = ctypes.addressof(memory)
        pointers = (ctypes.c_void_p * len(offsets))(*[base + offset for offset in offsets])
        stream = torch.cuda.current_stream(self.device).cuda_stream
        start: Callable[[], tuple[Any, ...]]
        if overlaps:
            config = _overlapping(grid, threads, self.shared_bytes, stream)
            start = partial(driver.cuLaunchKernelEx, config, self.function, ctypes.addressof(pointers), 0)
        else:
            sizes = (*grid, threads, 1, 1, self.shared_bytes, stream)
            start = partial(driver.cuLaunchKernel, self.function, *sizes, ctypes.addressof(pointers), 0)
        result = start()
        if result[0] == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not used the device yet
            check(driver.cuCtxSetCurrent(_context(self.device)))
            result = start()
        check(result)


def _overlapping(grid: tuple[int, int, int], threads: int, shared_bytes: int, stream: int) -> Any:
    """The CUlaunchConfig of a launch that may start before the kernel before it has ended."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, stream
    config.attrs, config.numAttrs = [_overlap_attribute()], 1
    return config


@once
def _overlap_attribute() -> Any:
    """The CUlaunchAttribute of such a launch."""
    from cuda.bindings import driver

    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _code(value: Tensor | int | float) -> str:
    """The letter of `struct` for an argument."""
    if isinstance(value, Tensor):
        return "P"
    if isinstance(value, Int64):
        return "q"
    return "i" if isinstance(value, int) else "f"


def float_bits(value: float) -> int:
    """The bits of a float32, to be a macro: macros are integers."""
    return struct.unpack("i", struct.pack("f", value))[0]


@once
def _layout(signature: str) -> tuple[struct.Struct, list[int]]:
    """How arguments of these letters lie in memory as a C compiler would align them, and where each starts."""
    ends = [struct.calcsize(signature[: i + 1]) for i in range(len(signature))]
    return struct.Struct(signature), [
        end - struct.calcsize(letter) for end, letter in zip(ends, signature, strict=True)
    ]


@once
def kernel(files: tuple[str, ...], name: str, device: int, shared_bytes: int = 0, **defines: int) -> Kernel:
    """Compile and load a kernel of a `.cu` file of `lexico_kernels`.

    Args:
        files: paths within `lexico_kernels`, one behind the other a translation unit.
        name: of an `extern "C"` kernel in it.
        device: index of the CUDA device.
        shared_bytes: dynamic shared memory of a block.
        defines: macros.

    Raises:
        RuntimeError: it cannot be compiled or loaded.
    """
    return _load(source_text(files), name, device, shared_bytes, defines)


def source_text(files: tuple[str, ...]) -> str:
    """Files of `lexico_kernels`, one behind the other."""
    return "\n".join((SOURCES / file).read_text(encoding="utf-8") for file in files)


def _load(source: str, name: str, device: int, shared_bytes: int, defines: Mapping[str, int]) -> Kernel:
    from cuda.bindings import driver

    cubin = compile_source(source, architecture(torch.cuda.get_device_capability(device)), defines)
    # A step may be under capture already, which forbids loading in the default mode.
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    mode = check(driver.cuThreadExchangeStreamCaptureMode(relaxed))
    check(driver.cuCtxPushCurrent(_context(device)))
    try:
        module = check(driver.cuModuleLoadData(cubin))
        function = check(driver.cuModuleGetFunction(module, name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(function, attribute, shared_bytes))
    finally:
        check(driver.cuCtxPopCurrent())
        check(driver.cuThreadExchangeStreamCaptureMode(mode))
    return Kernel(function, device, shared_bytes)


@once
def _context(device: int) -> Any:
    """The context that torch works in."""
    from cuda.bindings import driver

    torch.cuda.init()
    return check(driver.cuDevicePrimaryCtxRetain(check(driver.cuDeviceGet(device))))


@once
def available(device: int) -> bool:
    """Whether kernels can be compiled for a CUDA device and loaded; where not, says why in the log, once."""
    reason = _unavailable(device)
    if reason:
        logger.warning("Kernels in CUDA C++ are not used, slower ones in Triton are: %s", reason)
    return not reason


def _unavailable(device: int) -> str:
    if torch.version.cuda is None:
        return "this is not PyTorch for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return f"the device is sm_{capability[0]}{capability[1]}, and they need sm_80 or newer"
    try:
        _load(PROBE, "probe", device, 0, {})
    except (
        ImportError,
        RuntimeError,
        ValueError,
    ) as error:  # cuda.bindings raises RuntimeErrors where libraries are missing
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
