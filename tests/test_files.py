"""Tensors written whole or not at all."""

import stat

import pytest
import torch
from lexico_kernels.files import write_whole
from safetensors.torch import load_file

from vllm_lexico.files import save_tensors


def test_tensors_have_the_permissions_of_any_file(tmp_path):
    write_whole(tmp_path / "text", "")
    save_tensors(tmp_path / "tensors", {"a": torch.arange(3)}, {"what": "three"})
    assert load_file(tmp_path / "tensors")["a"].tolist() == [0, 1, 2]
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["tensors", "text"]


def test_a_full_disk_is_an_os_error_and_leaves_what_was_there(tmp_path, full_disk):
    path = tmp_path / "tensors"
    save_tensors(path, {"a": torch.arange(3)})
    refused = pytest.raises(OSError, match=r"tensors cannot be written .*see that there is room")
    with refused, full_disk():
        save_tensors(path, {"a": torch.zeros(1000)})
    assert load_file(path)["a"].tolist() == [0, 1, 2] and list(tmp_path.iterdir()) == [path]
