"""The folder of compiled kernels: nothing is loaded from it but what this user's own compilation left there, whole."""

import errno
import os
import stat
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lexico_kernels.device import kernel_files

KERNEL, IDENTITY = b"\x7fELF" + bytes(range(256)) * 2, "source\0--option\0sm_90a\x0013"
OTHER = kernel_files.seal(b"\x7fELF of another", "another source")


class Compiler:
    """Counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return KERNEL


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_files, "_warnings", [])
    return tmp_path / "vllm-lexico" / "kernels"


def compiled_again(caplog, times=1):
    """Whether `times` of two calls compile, with one warning at most; returns the warnings."""
    compiler = Compiler()
    caplog.clear()
    assert [kernel_files.kept(IDENTITY, compiler) for _ in range(2)] == [KERNEL] * 2
    assert compiler.calls == times
    return [record.getMessage() for record in caplog.records]


def kept_file(folder):
    kernel_files.kept(IDENTITY, Compiler())
    (file,) = folder.iterdir()
    return file


def test_kept_once_and_for_this_user_alone(folder, caplog):
    previous = os.umask(0)
    try:
        assert compiled_again(caplog) == []
    finally:
        os.umask(previous)
    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert compiled_again(caplog, times=0) == []


@pytest.mark.parametrize(
    "content",
    [b"", KERNEL, OTHER, kernel_files.seal(KERNEL, IDENTITY)[:-1], kernel_files.seal(KERNEL, "other options")],
    ids=["emptied", "planted", "another kernel's", "cut", "another compilation's"],
)
def test_damaged_files_are_compiled_again_and_replaced(folder, content, caplog):
    file = kept_file(folder)
    file.write_bytes(content)
    (warning,) = compiled_again(caplog)
    assert str(file) in warning and "damaged" in warning
    assert compiled_again(caplog, times=0) == []


def foreign(monkeypatch, path):
    """As if `path` belonged to another user."""
    check, theirs = kernel_files._check_own, path.stat()

    def changed(status):
        same = (status.st_ino, status.st_ctime_ns) == (theirs.st_ino, theirs.st_ctime_ns)
        return os.stat_result([*status[:4], status.st_uid + 1, *status[5:]]) if same else status

    monkeypatch.setattr(kernel_files, "_check_own", lambda status: check(changed(status)))


def test_files_of_others_are_not_read(folder, caplog, monkeypatch):
    """As root leaves them in a container that was warmed when it was built."""
    foreign(monkeypatch, kept_file(folder))
    (warning,) = compiled_again(caplog)
    assert "another user" in warning


def test_folders_of_others_are_not_used(folder, caplog, monkeypatch):
    file = kept_file(folder)
    foreign(monkeypatch, folder)
    file.write_bytes(OTHER)
    (warning,) = compiled_again(caplog, times=2)
    assert "another user" in warning and str(folder) in warning
    assert file.read_bytes() == OTHER


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_files_that_others_may_write_are_not_read(folder, mode, caplog):
    file = kept_file(folder)
    file.chmod(mode)
    (warning,) = compiled_again(caplog)
    assert "others may write" in warning
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 or not file.stat().st_mode & 0o022


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_folders_that_others_may_write_are_not_used(folder, mode, caplog):
    kept_file(folder)
    folder.chmod(mode)
    (warning,) = compiled_again(caplog, times=2)
    assert "others may write" in warning


def test_files_that_cannot_be_read(folder, caplog, monkeypatch):
    """One warning, whatever goes wrong how often."""
    kept_file(folder)

    def refused(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(kernel_files, "_read_own", refused)
    (warning,) = compiled_again(caplog, times=2)
    assert "Permission denied" in warning


def test_links_pipes_and_folders_are_not_read(folder, caplog):
    file = kept_file(folder)
    elsewhere = folder.parent / "elsewhere"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    assert len(compiled_again(caplog)) == 1
    assert not file.is_symlink()
    kernel_files._warnings.clear()
    file.unlink()
    os.mkfifo(file, 0o600)
    assert len(compiled_again(caplog)) == 1
    kernel_files._warnings.clear()
    file.unlink()
    file.mkdir(0o700)
    assert len(compiled_again(caplog, times=2)) == 1


def test_without_a_home(monkeypatch, caplog):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory")))
    (warning,) = compiled_again(caplog, times=2)
    assert "HOME" in warning


def test_a_file_where_the_folder_would_be(folder, caplog):
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    assert len(compiled_again(caplog, times=2)) == 1


def test_a_full_disk_leaves_nothing(folder, monkeypatch, caplog):
    write = Path.write_bytes

    def half(self, content):
        write(self, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    (warning,) = compiled_again(caplog, times=2)
    assert "No space left" in warning
    assert not [*folder.iterdir()]


SEALED = kernel_files.seal(KERNEL, IDENTITY)


def mutated(kind, at, until, new):
    """SEALED with a bit flipped, cut, with bytes replaced, put in or behind it, or of another kernel or compilation."""
    if kind == "flip":
        return SEALED[:at] + bytes([SEALED[at] ^ 1 << until % 8]) + SEALED[at + 1 :]
    if kind == "seal":
        return kernel_files.seal(KERNEL[:at] + new + KERNEL[until:], IDENTITY[: until % 20])
    return {"cut": SEALED[:at], "append": SEALED + new, "replace": SEALED[:at] + new + SEALED[until:], "plant": new}[
        kind
    ]


PLACES = st.integers(0, len(SEALED) - 1)
MUTATIONS = st.builds(
    mutated,
    st.sampled_from(["flip", "seal", "cut", "append", "replace", "plant"]),
    PLACES,
    PLACES,
    st.binary(max_size=6),
)


def test_mutated_files_are_never_loaded(monkeypatch):
    """Whatever stands in a kernel's file, what is loaded is the kernel: from the file or compiled afresh."""
    stands, compiled = SEALED, 0
    monkeypatch.setattr(kernel_files, "_read_own", lambda _: stands)  # the disk's part is tested above
    monkeypatch.setattr(kernel_files, "write_whole", lambda *_, **__: None)
    monkeypatch.setattr(kernel_files.logger, "disabled", True)

    @settings(max_examples=3000, deadline=None, database=None, phases=[Phase.generate])
    @given(MUTATIONS)
    def mutate(content):
        nonlocal stands, compiled
        stands, compiler = content, Compiler()
        assert kernel_files.kept(IDENTITY, compiler) == KERNEL
        assert compiler.calls == (content != SEALED)
        compiled += compiler.calls

    mutate()
    assert compiled > 2000
