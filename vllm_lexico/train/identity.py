"""What a training belongs to: the model's files, by their content."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Files of a checkpoint that decide what its model says.
MODEL_SUFFIXES = (".bin", ".gguf", ".jinja", ".json", ".model", ".pt", ".pth", ".safetensors", ".txt")


def model_identity(model: str, revision: str | None) -> str:
    """The commit of a model on the hub; of a folder, SHA-256 of the names and contents of the files that decide it.

    Args:
        model: hub id or folder.
        revision: the commit, for a model of the hub.

    Returns:
        "commit ..." or "sha256 ...".

    Raises:
        OSError: a file cannot be read.
    """
    folder = Path(model)
    if not folder.is_dir():
        return f"commit {revision or 'unknown'}"
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in MODEL_SUFFIXES]
    with ThreadPoolExecutor(8) as threads:  # large checkpoints have many files, and hashing releases Python's lock
        digests = list(threads.map(_file_digest, files))
    whole = hashlib.sha256()
    for path, digest in zip(files, digests, strict=True):
        whole.update(f"{path.name}\0{digest}\0".encode(errors="surrogateescape"))
    return f"sha256 {whole.hexdigest()}"


def _file_digest(path: Path) -> str:
    target = path.resolve()
    if path.is_symlink() and target.parent.name == "blobs":  # the hub's cache, which names files by their content
        return target.name
    return file_checksum(path)


def file_checksum(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
