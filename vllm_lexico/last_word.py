"""The last line that a user reads when an engine does not start.

A worker's exception goes to the log of its process and no further: the process that the user started ends with "Engine
core initialization failed", a hundred lines below the reason. So that process makes a file, the name of which goes with
the engine's configuration to each process below it (`compat.registered_member`), or with a fork. A refusal that comes
up there is also written to the file, and the user's process ends with it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

_folder: tempfile.TemporaryDirectory[str] | None = None  # of the process that the user started; goes when it ends
_path: str | None = None


def prepare() -> None:
    """Make the file, once per process, and empty it; without room for it nothing is repeated."""
    global _folder, _path
    with contextlib.suppress(OSError):
        if _folder is None:
            _folder = tempfile.TemporaryDirectory(prefix="vllm-lexico-")
            _path = str(Path(_folder.name) / "refusal")
        Path(_folder.name, "refusal").write_text("")


def path() -> str | None:
    """Name of the file, for processes below this one."""
    return _path


def inherit(given: str | None) -> None:
    """Know the file of the process that the user started."""
    global _path
    if given is not None:
        _path = given


def say(sentence: str) -> None:
    """Write a refusal for the user's process to end with. The file is never made here: its owner may be gone."""
    if _path is not None:
        with contextlib.suppress(OSError), Path(_path).open("r+", encoding="utf-8", errors="replace") as file:
            file.truncate()
            file.write(sentence)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Repeat a refusal that comes up inside; also as a decorator."""
    try:
        yield
    except ValueError as error:
        say(str(error))
        raise


def take() -> str:
    """The refusal that was written since the last call; empty if none was."""
    if _path is None:
        return ""
    try:
        said = Path(_path).read_text(encoding="utf-8")
        Path(_path).write_text("", encoding="utf-8")
    except OSError:
        return ""
    return said
