"""Where a model's configuration and the size of its weights come from: a folder, the hub's cache, or the hub."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vllm_lexico import hub
from vllm_lexico.dictionary.names import is_hub_id, printable
from vllm_lexico.errors import refusal

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
# The first kind of which a model has files is what vLLM loads. Mistral's own format repeats the weights.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf")
REPEATED = ("consolidated",)


class Weights(NamedTuple):
    """Bytes of a model's weights, and in words where that is known from."""

    num_bytes: int
    known_from: str


def config_folder(model: str) -> Path:
    """The folder that has a model's config.json: its own, or the snapshot in the hub's cache, fetched where missing.

    Args:
        model: hub id or folder.

    Raises:
        ValueError: there is no such folder, no configuration in it, or the hub does not have it or cannot be asked.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise ValueError(f"the folder {printable(model)} has no {CONFIG}; name the folder of a model")
        return folder
    if not is_hub_id(model):
        allowed = "a folder with a model, or a Hugging Face id (org/name)"
        raise ValueError(refusal("MODEL", model, allowed, "this is neither; check how it is written"))
    return hub.fetch(model, CONFIG, remedy="name a folder with the model").parent


def find_weights(model: str, folder: Path) -> Weights | None:
    """How many bytes a model's weights have, without reading them; None where neither files nor the hub tell.

    Args:
        model: hub id or folder.
        folder: that has its config.json.
    """
    if (total := _indexed(folder / INDEX)) is not None:
        return Weights(total, f"its {INDEX}")
    files = [(path.name, path.stat().st_size) for path in folder.iterdir() if path.is_file()]
    if total := weight_bytes(files):
        return Weights(total, "the sizes of its files")
    if not is_hub_id(model):
        return None
    from huggingface_hub import HfApi

    try:
        listed = HfApi().model_info(model, files_metadata=True, timeout=hub.TIMEOUT_SECONDS).siblings or []
    except Exception:  # offline, or a hub that does not answer: the weights are counted otherwise then
        return None
    total = weight_bytes((one.rfilename, one.size or 0) for one in listed)
    return Weights(total, "the sizes of its files on the hub") if total else None


def weight_bytes(files: Iterable[tuple[str, int]]) -> int:
    """Bytes of the files that vLLM loads, of those of a model's folder.

    Args:
        files: names and bytes; those in folders below are another format's.
    """
    own = [(name, size) for name, size in files if "/" not in name]
    for suffix in WEIGHT_SUFFIXES:
        of_kind = [(name, size) for name, size in own if name.endswith(suffix) and not name.startswith("training_")]
        once = [(name, size) for name, size in of_kind if not name.startswith(REPEATED)] or of_kind
        if total := sum(size for _, size in once):
            return total
    return 0


def _indexed(path: Path) -> int | None:
    """What an index of safetensors files says that they hold."""
    try:
        total = json.loads(path.read_text(encoding="utf-8"))["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return int(total) if isinstance(total, int | float) and total > 0 else None
