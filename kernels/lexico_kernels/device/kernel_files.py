"""Compiled kernels on the disk: used again only if they are whole, of this very compilation, and the user's own."""

import hashlib
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

from lexico_kernels.files import cache_folder, write_whole

HEADER = b"lexico kernel\n"
DIGEST_BYTES = hashlib.sha256().digest_size
MAX_BYTES = 64 << 20  # of a file; kernels have some tens of thousands
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH

logger = logging.getLogger(__name__)
_warnings: list[str] = []  # of this process, one at most


def kept(identity: str, compile_kernel: Callable[[], bytes]) -> bytes:
    """A compiled kernel from the disk, or compiled now and kept there for later processes.

    A file that is damaged, of another compilation, of another user or writable by others is not used: the kernel is
    compiled afresh, and the first such finding of a process is a warning in the log. So is a folder that cannot be
    used or written.

    Args:
        identity: everything that decides what is compiled: source, options, architecture, compiler version.
        compile_kernel: makes the kernel; what it raises is raised.

    Returns:
        The machine code.
    """
    path = None
    try:
        path = _folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.kernel"
        return unseal(_read_own(path), identity)
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _warn(path, error)
    kernel = compile_kernel()
    if path is not None:
        try:
            path.unlink(missing_ok=True)  # what stands there may be a link, which writing would follow
            write_whole(path, seal(kernel, identity), mode=0o600)
        except (OSError, ValueError) as error:
            _warn(path, error)
    return kernel


def seal(kernel: bytes, identity: str) -> bytes:
    """A file's content: the kernel behind a checksum of it and its identity."""
    return HEADER + _digest(kernel, identity) + kernel


def unseal(content: bytes, identity: str) -> bytes:
    """The kernel in a file.

    Raises:
        ValueError: the content is not what `seal` made of a kernel of this identity.
    """
    start = len(HEADER) + DIGEST_BYTES
    kernel = content[start:]
    if content[:start] != HEADER + _digest(kernel, identity):
        raise ValueError("it is damaged or of another kernel")
    return kernel


def _digest(kernel: bytes, identity: str) -> bytes:
    parts = (hashlib.sha256(part).digest() for part in (identity.encode(), kernel))
    return hashlib.sha256(b"".join(parts)).digest()


def _folder() -> Path:
    """The folder of compiled kernels, made for this user alone if it is missing.

    Raises:
        OSError: it cannot be made.
        ValueError: no cache folder is known, or this one is another user's or writable by others.
    """
    folder = cache_folder() / "kernels"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        _check_own(folder.stat())
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return folder


def _read_own(path: Path) -> bytes:
    """The content of a regular file of this user.

    Raises:
        OSError: it is missing, cannot be read, or is a link.
        ValueError: it is another user's, writable by others, no regular file, or too large.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # would wait for a pipe's writer
    try:
        status = os.fstat(handle)
        _check_own(status)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise ValueError("it is no compiled kernel")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(MAX_BYTES)
    finally:
        os.close(handle)


def _check_own(status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise ValueError("it belongs to another user")
    if status.st_mode & WRITABLE_BY_OTHERS:
        raise ValueError("others may write to it")


def _warn(path: Path | None, reason: Exception) -> None:
    """Say once a process that a kernel is compiled again, and why."""
    if not _warnings:
        _warnings.append(f"{path}: {reason}" if path else str(reason))
        logger.warning(
            "Kernels are compiled afresh, which takes seconds each, because the disk's cannot be used or kept: %s; "
            "delete the folder of compiled kernels, or set XDG_CACHE_HOME to a folder of your own",
            _warnings[0],
        )
