"""Names of models: which two mean one model, and what a dictionary made for one is called."""

import re
import shlex
from pathlib import Path


def file_name(model_name: str) -> str:
    """Name of a model's dictionary file: "Qwen/Qwen2.5-7B" -> "Qwen_Qwen2.5-7B.safetensors"."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", _plain_name(model_name)) + ".safetensors"


def train_command(model_name: str) -> str:
    """The shell command that makes a dictionary of this model."""
    return f"vllm-lexico train {shlex.quote(model_name)}"


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: ids compare whole, paths and bare names by their last part; case is ignored."""
    if is_hub_id(one) and is_hub_id(other):
        return one.casefold() == other.casefold()
    return Path(one).name.casefold() == Path(other).name.casefold()


def is_hub_id(name: str) -> bool:
    """Whether a model's name is an id on the hub, org/name, and no folder here."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def _plain_name(model_name: str) -> str:
    return model_name if is_hub_id(model_name) else Path(model_name).resolve().name
