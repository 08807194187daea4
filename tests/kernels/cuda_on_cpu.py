"""Kernels in CUDA C++ on a CPU: the same sources but for their primitives, compiled by g++ and run thread by thread."""

import ctypes
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from lexico_kernels.device import nvrtc
from torch import Tensor

FOLDER = Path(__file__).parent
SEED = 1  # of the order in which threads go on


def folder_for_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where kernels for the CPU are built, once a session; skips the test where nothing can build them."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    folder = tmp_path_factory.getbasetemp() / "cuda_on_cpu"
    folder.mkdir(exist_ok=True)
    return folder


class OnCpu:
    """Stands in for `nvrtc.Kernel`; a `.cpp` file beside this one says how it is called."""

    def __init__(self, folder: Path, files: tuple[str, ...], cpp: str, name: str, macros: dict[str, int]) -> None:
        source = folder / f"{cpp}.cu"
        source.write_text("\n".join((nvrtc.SOURCES / file).read_text() for file in files))
        flags = [f"-D{macro}={value}" for macro, value in sorted(macros.items())]
        flags += [f'-DSOURCE="{source}"', "-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC"]
        path = folder / f"{hashlib.sha256(' '.join(flags).encode()).hexdigest()[:16]}.so"
        if not path.exists():
            subprocess.run(["g++", *flags, FOLDER / cpp, "-o", path], check=True)
        self.call = getattr(ctypes.CDLL(str(path)), f"launch_{name}")

    def launch(self, grid: tuple[int, int, int], threads: int, *arguments: Tensor | int | float) -> None:
        """As the kernel's."""
        kinds = {nvrtc.Int64: ctypes.c_longlong, int: ctypes.c_int, float: ctypes.c_float}
        values = [
            ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else kinds[type(x)](x) for x in arguments
        ]  # fmt: skip
        self.call(grid[0], grid[1], SEED, *values)
