"""Compiling and calling CUDA C++; what needs no GPU is tested without one."""

import pytest
import torch
from lexico_kernels.device import nvrtc

ADD = """
extern "C" __global__ void add(float* out, int count, long long offset, float amount, const float* more) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < count) out[i + offset] += amount * FACTOR + more[i];
}
"""


@pytest.fixture
def folder(monkeypatch, tmp_path):
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vllm-lexico" / "kernels"


def test_architectures():
    assert nvrtc.architecture((8, 0)) == "sm_80"
    assert nvrtc.architecture((9, 0)) == "sm_90a"
    assert nvrtc.architecture((12, 0)) == "sm_120a"


def test_arguments_lie_as_a_c_compiler_puts_them():
    packing, offsets = nvrtc._layout("PiqfP")
    assert offsets == [0, 8, 16, 24, 32]
    assert packing.size == 40
    values = (torch.zeros(1), 1, nvrtc.Int64(1), 1.0)
    assert "".join(map(nvrtc._code, values)) == "Piqf"


def test_what_is_compiled_is_kept(folder):
    cubin = nvrtc.compile_source(ADD, "sm_90a", {"FACTOR": 2})
    assert cubin.startswith(b"\x7fELF")
    (file,) = folder.iterdir()
    assert file.read_bytes().endswith(cubin)
    stamp = file.stat().st_mtime_ns, file.stat().st_ino
    assert nvrtc.compile_source(ADD, "sm_90a", {"FACTOR": 2}) == cubin
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == stamp, "compiled and written again"
    for source, arch, factor in ((ADD, "sm_80", 2), (ADD, "sm_90a", 3), (ADD + "\n", "sm_90a", 2)):
        assert nvrtc.compile_source(source, arch, {"FACTOR": factor}).startswith(b"\x7fELF")
    assert len([*folder.iterdir()]) == 4


def test_errors_say_what_the_compiler_says(folder):
    with pytest.raises(RuntimeError, match='identifier "FACTOR" is undefined'):
        nvrtc.compile_source(ADD, "sm_80")
    assert not [*folder.iterdir()]


@pytest.mark.gpu
def test_launch_in_a_graph_and_out_of_one(folder, monkeypatch, tmp_path):
    (tmp_path / "add.cu").write_text(ADD)
    monkeypatch.setattr(nvrtc, "SOURCES", tmp_path)
    assert nvrtc.available(0)
    out, more = torch.zeros(300, device="cuda"), torch.ones(200, device="cuda")

    def step():  # loading under capture must work too
        nvrtc.kernel(("add.cu",), "add", 0, FACTOR=3).launch((2, 1, 1), 128, out, 200, nvrtc.Int64(100), 0.5, more)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    step()
    assert out[:100].eq(0).all()
    assert out[100:].eq(5).all()
