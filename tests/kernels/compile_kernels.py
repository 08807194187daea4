"""Compile every kernel for an H100 through the public launchers, without a GPU: `python compile_kernels.py`.

The interpreter accepts much that the compiler refuses. Here Triton sees a driver that only names its target, and each
launch stops after compilation. Prints registers, stack and shared memory of each kernel as ptxas reports them, and
fails if one needs more shared memory than the device has. What starts before its predecessor has ended is compiled for
other GPUs too, in each way that they can (`device/overlap.py`).
"""

import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from lexico_kernels import CodeLayout, LayerStack, plan_decode
from lexico_kernels import reconstruct as history
from lexico_kernels import write_tail as tail
from lexico_kernels.device.launch import LAYERS, fp8_fits
from lexico_kernels.memory.pages import DecodePlan
from lexico_kernels.omp_encode import all_layers as omp_layers
from lexico_kernels.omp_encode import pursuit
from lexico_kernels.omp_encode import tiles as omp
from lexico_kernels.sparse_decode import lookup
from lexico_kernels.sparse_decode import portable as decode
from lexico_kernels.testing import fp8_cache, random_problem
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

SHARED_BYTES = 232448  # of a thread block on sm_90
GPUS = {  # by capability: the same, and whether kernels start before the one before has ended
    80: (166912, (False,)),
    90: (SHARED_BYTES, (False, True)),
    100: (SHARED_BYTES, (False, True)),
    120: (101376, (False, True)),
}
CASES = [  # head_dim, sparsity, codec, dtype, atoms, tokens of a launch: few and many
    (128, 15, "packed16", torch.bfloat16, 4096, (32, 4096)),
    (128, 7, "packed16", torch.float16, 4096, (4096,)),
    (128, 31, "packed16", torch.bfloat16, 4096, (4096,)),
    (64, 15, "packed16", torch.bfloat16, 1024, (32,)),
    (128, 15, "packed16", torch.float32, 4096, (4096,)),
    (256, 31, "packed16", torch.bfloat16, 4096, (4096,)),
    (128, 15, "exact", torch.bfloat16, 4096, (1,)),
]


class NamesTheTarget:
    """The parts of a Triton driver that compilation asks for, of a GPU of such a capability."""

    def __init__(self, capability: int = 90) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability  # what is compiled is kept by device

    def get_current_stream(self, _: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def ptxas_report(cubin: bytes) -> str:
    """Registers and stack of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        printed = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return " ".join(re.findall(r"REG:\d+|STACK:\d+", printed))


def compile_only(kernel: JITFunction, grid: object):
    """What stands in for `kernel[grid]`: compiles for the arguments and reports."""

    def launch(*args: object, **kwargs: object) -> None:
        compiled = kernel.warmup(*args, grid=grid, **kwargs)
        shared = compiled.metadata.shared
        tile, warps = kwargs.get("TILE", 1), kwargs["num_warps"]
        report = ptxas_report(compiled.asm["cubin"])
        print(f"  {kernel.__name__:14s} tile {tile:3d} warps {warps}: {report} shared {shared}", flush=True)
        if kernel.__name__ == "_write_tail":  # members of NamedTuples are specialised: pointers and strides are aligned
            assert "ld.global.v4.b32" in compiled.asm["ptx"], "rows are not loaded 16 bytes at a time"
        assert shared <= SHARED_BYTES, f"{kernel.__name__} needs {shared} bytes of shared memory"

    return launch


def follow_ptx(kernel: JITFunction, overlap: bool, shared_bytes: int):
    """What stands in for `kernel[grid]`: sees that a kernel waits and triggers in this way, and no other."""

    def launch(*args: object, **kwargs: object) -> None:
        compiled = kernel.warmup(*args, grid=(1,), **kwargs)
        ptx, name = compiled.asm["ptx"], kernel.__name__
        assert compiled.metadata.launch_pdl == overlap, name
        assert ("griddepcontrol.wait" in ptx) == overlap, name
        before = ptx.split("griddepcontrol.wait")[0] if overlap else ""
        assert "ld.global" not in before and "st.global" not in before, f"{name} does not wait first"
        assert ("griddepcontrol.launch_dependents" in ptx) == (overlap and name != "merge"), name
        assert compiled.metadata.shared <= shared_bytes, name

    return launch


def follow_one_another() -> None:
    """Compile a step of decode for each GPU in each way."""
    problem = random_problem(CodeLayout(128, 8, 15, 15), [40], atoms=4096, dtype=torch.bfloat16)
    key, slots = torch.zeros(32, 8, 128, dtype=torch.bfloat16), torch.zeros(32, dtype=torch.int64)
    query, step = key.new_zeros(1, 32, 128), torch.zeros(2, 1, dtype=torch.int32)
    for capability, (shared_bytes, ways) in GPUS.items():
        triton.runtime.driver.set_active(NamesTheTarget(capability))
        for overlap in ways:
            print(f"sm_{capability} {overlap = }", flush=True)
            tail.overlap_on = lookup.overlap_on = lambda _, way=overlap: way
            JITFunction.__getitem__ = lambda kernel, _, way=overlap, most=shared_bytes: follow_ptx(kernel, way, most)
            tail.write_tail(key, key, problem.cache, slots)
            lookup.sparse_decode(query, problem.cache, problem.tables, *step, scale=0.1)


def plan_a_step() -> None:
    """Compile what builders launch."""
    numbers, table = torch.zeros(64, dtype=torch.int32), torch.zeros(1, 8, dtype=torch.int32)
    batch, out = (numbers[:2], numbers[:1]), DecodePlan(numbers[:1], numbers[:1], numbers, numbers, numbers.long())
    plan_decode.plan_codes(*batch, table, block_tokens=128, out=out)
    for tail_tokens, window_tokens in ((16, 128), (8, 65536)):
        reach = 1, tail_tokens, window_tokens, 32
        plan_decode.plan_tail(*batch, table, numbers, numbers, numbers, numbers[:1], *reach)


def main() -> None:
    """Compile all kernels for all cases."""
    triton.runtime.driver.set_active(NamesTheTarget())
    JITFunction.__getitem__ = compile_only
    # Its steps in CUDA C++ are not Triton's to compile; test_lookup.py does that.
    lookup.attend_codes = lookup.multiply_bins = lambda *_: None
    lookup.shared_limit_bytes = lambda _: SHARED_BYTES
    print("triton", triton.__version__)
    plan_a_step()
    for head_dim, sparsity, codec, dtype, atoms, sizes in CASES:
        print(f"{codec} D {head_dim} S {sparsity} N {atoms} {dtype}")
        layout = CodeLayout(head_dim, 8, sparsity, sparsity, codec=codec, element_bytes=dtype.itemsize)
        problem = random_problem(layout, [40], atoms=atoms, dtype=dtype)
        cache, tables = problem.cache, problem.tables
        for tokens in sizes:
            key = torch.zeros(tokens, 8, head_dim, dtype=dtype)
            addresses = torch.zeros(tokens, dtype=torch.int64)
            omp.omp_encode(key, key, cache, addresses.int(), addresses)
            if tokens == sizes[0]:
                for jobs in (32, LAYERS.few_jobs + 32):
                    list_of = torch.zeros(jobs, dtype=torch.int64)
                    omp_layers.omp_encode_layers(LayerStack.of([cache]), list_of.int(), list_of)
            if codec != "exact" and fp8_fits(head_dim, sparsity):
                omp.omp_encode(key, key, fp8_cache(cache), addresses.int(), addresses)
            if codec == "packed16" and tokens == sizes[-1]:
                books, levels = cache.key.atoms[:2].contiguous(), torch.zeros(2, 16)
                vectors = torch.zeros(2, tokens * 8, head_dim)
                pursuit.pursue(vectors, books, sparsity)
                pursuit.pursue(vectors, books, sparsity, levels)
        tail.write_tail(key, key, cache, addresses)
        history.reconstruct(cache, tables, addresses.int(), addresses.int(), key, key)
        query = torch.zeros(1, 32, head_dim, dtype=dtype)
        step = (cache, tables, *torch.zeros(2, 1, dtype=torch.int32))
        decode.sparse_decode(query, *step, scale=0.1)
        decode.sparse_decode(query, *step, scale=0.1, sinks=query[0, :, 0].contiguous())
        if codec == "packed16" and dtype in lookup.DTYPES:
            lookup.sparse_decode(query, *step, scale=0.1)
            lookup.sparse_decode(query, *step, scale=0.1, sinks=query[0, :, 0].contiguous())
            lookup.sparse_decode(query.repeat(1, 2, 1)[:, :56], *step, scale=0.1)
        if head_dim == 256:  # Gemma 2's
            decode.sparse_decode(query, *step, scale=0.1, soft_cap=50.0)
            lookup.sparse_decode(query, *step, scale=0.1, soft_cap=50.0)
    follow_one_another()


if __name__ == "__main__":
    main()
