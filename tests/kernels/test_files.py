"""Files written whole or not at all, and the user's cache folder."""

import os
import stat
import threading
from pathlib import Path

import pytest
from lexico_kernels.files import cache_folder, try_beside, whole_file, write_whole


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "vllm-lexico"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/vllm-lexico")


def test_no_home_is_one_sentence(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(ValueError, match="the user has no home; set HOME, or XDG_CACHE_HOME"):
        cache_folder()


def test_written_with_the_permissions_asked_for(tmp_path):
    before = os.umask(0o022)
    try:
        write_whole(tmp_path / "new" / "a.txt", "é\n")
        write_whole(tmp_path / "new" / "own", b"\0", mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"\xc3\xa9\n"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {"a.txt": 0o644, "own": 0o600}


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    write_whole(path, "old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_no_litter(tmp_path, full_disk):
    path = tmp_path / "a"
    write_whole(path, "old")
    with pytest.raises(OSError, match="File too large"), full_disk():
        write_whole(path, bytes(2000))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_is_no_file_is_not_replaced(tmp_path):
    with pytest.raises(ValueError, match="is not a file, so it cannot be written"):
        write_whole(tmp_path, "")
    with pytest.raises(ValueError, match=r"/dev/null is not a file"):
        write_whole(Path("/dev/null"), "")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_whole(tmp_path / "link", "through")
    assert (tmp_path / "target").read_text() == "through" and (tmp_path / "link").is_symlink()


def test_many_writers_leave_one_of_their_files(tmp_path):
    path, contents = tmp_path / "a", [bytes([number]) * 200_000 for number in range(8)]
    writers = [threading.Thread(target=write_whole, args=(path, content)) for content in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_bytes() in contents and list(tmp_path.iterdir()) == [path]


def test_a_place_is_tried_and_left_as_it_was(tmp_path):
    try_beside(tmp_path / "missing" / "too" / "file")
    (tmp_path / "text").write_text("")
    with pytest.raises(NotADirectoryError) as error:
        try_beside(tmp_path / "text" / "file")
    assert error.value.filename == str(tmp_path / "text")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
