"""A model's folder with nothing but a configuration, and a user's cache that is empty."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from configurations import FAMILIES


@pytest.fixture
def write_family(tmp_path):
    """Write a family's config.json into a folder of its name, changed as asked."""

    def write(name: str, **changes: Any) -> str:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(FAMILIES[name] | changes))
        return str(folder)

    return write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The user's cache, empty; and no hub."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vllm-lexico"


@pytest.fixture
def write_dictionary(load_benchmark):
    """Write a small random dictionary for a folder's model."""
    import dataclasses

    from vllm_lexico.dictionary.file import load_dictionary

    shapes = load_benchmark("bench/shapes")

    def write(folder: str, path: Path, *, name: str) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = shapes.write_random_dictionary(Path(folder), atoms=64)
        dictionary = load_dictionary(written)
        written.unlink()
        path.unlink(missing_ok=True)
        dataclasses.replace(dictionary, info=dataclasses.replace(dictionary.info, model_name=name)).save(path)
        return path

    return write
