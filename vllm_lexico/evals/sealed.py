"""JSON files with a checksum: an evaluation trusts only what it wrote whole.

A sealed file is one JSON object. Its field `sha256` is the checksum of all its other fields, written as JSON with
sorted keys and without spaces.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lexico_kernels.files import write_whole
from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

SEAL = "sha256"


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """Write an object and its checksum, whole or not at all.

    Raises:
        ValueError: a number is not finite.
        OSError: the file cannot be written.
    """
    write_whole(path, json.dumps({**values, SEAL: _checksum_of(values)}, indent=1) + "\n")


def read_sealed(path: Path, fields: Any) -> dict[str, Any]:
    """Read an object that `write_sealed` wrote, without its checksum.

    Args:
        path: the file.
        fields: type of the object.

    Raises:
        ValueError: the file is absent, cut short, damaged or something else.
    """
    values = parse(read_bytes(path), path)
    if not isinstance(values, dict) or SEAL not in values:
        raise ValueError(f"{path} is damaged: it is no JSON object with a checksum")
    seal = values.pop(SEAL)
    try:
        expected = _checksum_of(values)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if seal != expected:
        raise ValueError(f"{path} is damaged: its checksum is not that of its content")
    check(values, fields, path)
    return values


def read_bytes(path: Path) -> bytes:
    """The content of a file; ValueError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def parse(content: bytes, path: Path) -> Any:
    """The value of JSON text from a file; ValueError where it is none, nested too deeply, or has too long a number."""
    try:
        return from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def check(values: Any, fields: Any, path: Path) -> None:
    """Check what was read from a file against its type; ValueError names the first field that is wrong."""
    try:
        _adapter(fields).validate_python(values)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, wrong["loc"])).encode("unicode_escape").decode()[:200]
        raise ValueError(f"{path} is damaged: {where or 'all of it'}: {wrong['msg']}") from error


@functools.cache
def _adapter(fields: Any) -> TypeAdapter[Any]:
    return TypeAdapter(fields)


def checksum(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def _checksum_of(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return checksum(text.encode())
