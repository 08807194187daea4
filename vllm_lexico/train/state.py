"""What an interrupted training goes on from: a folder of files, each whole, checked and of one run.

A file is a safetensors file. Its metadata has the run's identity, facts that go with the tensors, and a SHA-256 of all
of it. A file that is damaged is passed over with a warning, so that what it held is learned again; a file of another
run stops this one.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lexico_kernels.files import try_beside
from safetensors import SafetensorError, safe_open

from vllm_lexico.files import save_tensors

logger = logging.getLogger("vllm.lexico")

STATE_FORMAT = 2  # of these files and of what learning makes of them
SUFFIX = ".state"
LOCK = "lock"
LOCK_SECONDS = 5.0  # in which a training that is being stopped has ended


class DamagedStateError(Exception):
    """A file of state cannot be trusted; says why."""


@dataclass(frozen=True)
class Kept:
    """What one file holds.

    Args:
        tensors: by name, on the CPU.
        facts: what goes with them, as JSON can hold it.
    """

    tensors: dict[str, torch.Tensor]
    facts: Any


def check_writable(out: Path, *, given: bool) -> None:
    """See, before any work is done, that a folder can be made beside the file to write; nothing is left there.

    Args:
        out: the file; of folders that are missing too, the first one that is there has to take another.
        given: whether it was named by --out.

    Raises:
        ValueError: nothing can be written there.
    """
    for path in dict.fromkeys((out.absolute(), Path(os.path.realpath(out)))):  # state is beside a link, not its target
        try:
            try_beside(path)
        except OSError as error:
            subject = f"--out is {out}" if given else f"--out is not given, and its default is {out}"
            raise ValueError(
                f"{subject}, and {error.filename} cannot be written to ({error.strerror}); allowed: a file in a folder "
                f"that can; {'name another' if given else 'give --out'}"
            ) from error


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run.

    Args:
        folder: made when it is locked.
        identity: everything that decides what this run learns, as JSON can hold it.
    """

    folder: Path
    identity: dict[str, Any]

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have the folder alone; at the end a folder without state is removed.

        Raises:
            ValueError: another process trains here, or the folder has state of another run.
            OSError: the folder cannot be made.
        """
        lock = self._lock()
        try:
            self._check_owner()
            yield
        finally:
            if not self.has_state():
                self._remove()
            lock.release()

    def save(self, name: str, kept: Kept) -> None:
        """Write one file, whole or not at all. OSError when it cannot be written."""
        words = {"identity": json.dumps(self.identity, sort_keys=True), "facts": json.dumps(kept.facts)}
        metadata = words | {"format": "lexico-training", "sha256": _checksum(words, kept.tensors)}
        save_tensors(self.folder / (name + SUFFIX), kept.tensors, metadata)

    def load(self, name: str) -> Kept | None:
        """What `save` wrote; None when there is nothing, or with a warning when it is damaged.

        Raises:
            ValueError: it is of another run.
        """
        path = self.folder / (name + SUFFIX)
        if not path.exists():
            return None
        try:
            identity, kept = _read(path)
        except DamagedStateError as error:
            logger.warning("%s is passed over and what it held is learned again: %s", path, error)
            return None
        differences = [key for key in sorted(identity | self.identity) if identity.get(key) != self.identity.get(key)]
        if differences:
            words = ", ".join(_difference(key, identity.get(key), self.identity.get(key)) for key in differences)
            raise ValueError(
                f"{self.folder} holds rounds of another run ({words}); delete it, or repeat that run as it was"
            )
        return kept

    def facts(self, name: str) -> Any:
        """The facts of what `save` wrote, unchecked, without its tensors; None where there are none to read."""
        try:
            with safe_open(str(self.folder / (name + SUFFIX)), framework="pt") as file:
                return json.loads((file.metadata() or {})["facts"])
        except (SafetensorError, OSError, ValueError, KeyError):
            return None

    def has_state(self) -> bool:
        """Whether anything is kept."""
        return any(self.folder.glob(f"*{SUFFIX}"))

    def remove(self) -> None:
        """Forget the run, which is finished."""
        for path in self.folder.glob(f"*{SUFFIX}"):
            path.unlink()
        self._remove()

    def _lock(self) -> FileLock:
        lock = FileLock(self.folder / LOCK)
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=LOCK_SECONDS)
            except Timeout:
                raise ValueError(
                    f"another process trains into {self.folder} now; wait until it is done, or name another file with "
                    f"--out"
                ) from None
            if (self.folder / LOCK).exists():  # else its holder was done and removed it
                return lock
            lock.release()

    def _check_owner(self) -> None:
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            self.load(path.name.removesuffix(SUFFIX))

    def _remove(self) -> None:
        for left in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            left.unlink()
        (self.folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files in it
            self.folder.rmdir()


def _difference(key: str, there: Any, here: Any) -> str:
    """In words, as short as they need be."""
    pair = [json.dumps(side) for side in (there, here)]
    return f"another {key}" if max(map(len, pair)) > 40 else f"{key} {pair[0]} there and {pair[1]} here"


def _read(path: Path) -> tuple[dict[str, Any], Kept]:
    """(identity, content) of a file whose checksum fits. DamagedStateError for all others."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        words = {name: metadata[name] for name in ("identity", "facts")}
        if metadata["sha256"] != _checksum(words, tensors):
            raise DamagedStateError("its checksum does not match its content")
        return json.loads(words["identity"]), Kept(tensors, json.loads(words["facts"]))
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise DamagedStateError(f"it cannot be read ({error})") from error
    except KeyError as error:
        raise DamagedStateError(f"it has no {error}") from error


def _checksum(words: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of everything in a file: names, types, shapes and numbers."""
    digest = hashlib.sha256(json.dumps([STATE_FORMAT, words["identity"], words["facts"]]).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
