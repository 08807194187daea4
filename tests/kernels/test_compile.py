"""The kernels compile for a GPU that this machine need not have."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_all_kernels_compile():
    """In a process of its own: in this one the kernels may belong to the interpreter."""
    script = Path(__file__).parent / "compile_kernels.py"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-4000:]}"
