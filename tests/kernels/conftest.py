"""Without a GPU the kernels run in Triton's interpreter; with one the same tests run them compiled.

Triton reads the switch when a function is decorated, so it is on only while Triton and the kernels are imported here,
before any test module: neither tests elsewhere nor the processes they start see it. Should something have imported
Triton earlier in this process (`pytest tests` with a plugin that does), run this folder on its own: `pytest
tests/kernels`.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests find cuda_on_cpu.py by its name

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if DEVICE == "cpu":
    if "triton" in sys.modules:
        raise RuntimeError(
            "Triton was imported before its interpreter could be switched on: run `pytest tests/kernels`"
        )
    previous = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import lexico_kernels.omp_encode.all_layers
        import lexico_kernels.omp_encode.pursuit
        import lexico_kernels.omp_encode.tiles
        import lexico_kernels.plan_decode
        import lexico_kernels.reconstruct
        import lexico_kernels.sparse_decode.lookup
        import lexico_kernels.sparse_decode.portable
        import lexico_kernels.write_tail  # noqa: F401

        # The interpreter's first launch would import this, which looks at the switch again.
        import triton.experimental.gluon  # noqa: F401
    finally:
        if previous is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = previous


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run."""
    return DEVICE
