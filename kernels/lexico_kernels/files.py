"""The user's cache folder, and files that are written whole or not at all."""

import contextlib
import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_folder() -> Path:
    """This project's folder in the user's cache: ~/.cache/vllm-lexico, or in XDG_CACHE_HOME.

    Raises:
        ValueError: neither XDG_CACHE_HOME nor a home folder is known.
    """
    try:
        parent = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise ValueError(
            "no folder for a cache is known: the user has no home; set HOME, or XDG_CACHE_HOME to a folder"
        ) from error
    return Path(parent) / "vllm-lexico"


@contextlib.contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """Have a file written whole or not at all: `with whole_file(path) as unfinished:` write to `unfinished`.

    The unfinished file lies beside `path`, empty at first. When the block ends it is on the disk before it takes the
    name; when the block raises, or the disk is full, it is gone and what stood at `path` still stands. Writers of one
    file at a time do not meet: the last one wins. Folders that are missing are made.

    Args:
        path: the file; a link is followed.
        mode: permissions, less the user's umask.

    Raises:
        ValueError: `path` is there and no file.
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a file, so it cannot be written; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        os.close(os.open(unfinished, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
        permissions = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(permissions)  # a library may have put a file of its own in the place
        _sync(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync(path.parent)


def try_beside(path: Path) -> None:
    """See that something can be made beside a path, by making it; nothing is left there.

    Permissions alone do not tell: root has all of them, and some file systems take nothing.

    Args:
        path: of folders that are missing too, the first one that is there has to take another.

    Raises:
        OSError: it cannot, with that folder as `filename`.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=".lexico-", dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def write_whole(path: Path, content: str | bytes, mode: int = 0o666) -> None:
    """Write a file whole or not at all, as `whole_file` does. content: text is written in UTF-8."""
    with whole_file(path, mode) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
