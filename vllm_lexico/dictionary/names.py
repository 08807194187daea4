"""Names of models: which two mean one model, and what a dictionary made for one is called."""

import hashlib
import os
import re
import shlex
from pathlib import Path
from typing import Any

from vllm_lexico.errors import refusal

LONGEST_ID = 200  # letters; the hub allows 96 in each part
HUB_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._]|-(?!-))*"
# A folder of the hub's cache, .../models--ORG--NAME/snapshots/COMMIT; the hub allows no "--" in names.
HUB_OWNER = "vllm-lexico"  # of the project's own dictionaries on the hub
# What the names of quantized models have after the name of the model that they were made of.
QUANTIZED = re.compile(
    r"([-_.](awq|gptq|fp[48]|[nm][vx]fp[48]|int[48]|bnb|bitsandbytes|unsloth|quantized|w(4a16|8a8|8a16|4a4|4a8)|dynamic|"
    r"block|static|kv|g(32|64|128)|[2348]bits?|asym|sym|autoround))+$"
)
SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/[^/]+")


def check_words(what: str, given: Any, *, blank: bool = False) -> None:
    """Refuse what is not one line of printable text. blank: it may be blank.

    Raises:
        ValueError: in one sentence.
    """
    if not isinstance(given, str) or not given.isprintable() or not (blank or given.strip()):
        allowed = "one line of printable text" + ("" if blank else ", not blank")
        raise ValueError(refusal(what, given, allowed, "change it"))


def check_name(model_name: Any) -> None:
    """Refuse what no model can be called, see `check_words`."""
    check_words("the model's name", model_name)


def printable(text: str) -> str:
    """Text with line breaks, escape codes and the like written as Python writes them, as in "\\n"."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def is_hub_id(name: str) -> bool:
    """Whether a model's name is an id on the hub, org/name, and no folder here."""
    known = len(name) <= LONGEST_ID and re.fullmatch(f"{HUB_PART}/{HUB_PART}", name) is not None and ".." not in name
    return known and not Path(name).exists()


def plain_name(model_name: str) -> str:
    """The one way to write a model's name: an id, or any name alone, as it is; a folder as an absolute path.

    A snapshot's folder in the hub's cache, which is what vLLM is handed offline, is the id that it belongs to.
    """
    if is_hub_id(model_name) or ("/" not in model_name and not os.path.lexists(model_name)):
        return model_name
    path = Path(model_name)
    for folder in (path.absolute(), path.resolve()):  # a link into the hub's cache is a snapshot too
        if snapshot := SNAPSHOT.fullmatch(str(folder)):
            return snapshot[1].replace("--", "/", 1)
    return str(path.resolve())


def _is_path(plain: str) -> bool:
    return Path(plain).is_absolute()


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one model for certain.

    Ids compare without case, folders by their path; a folder .../ORG/NAME is the id ORG/NAME.
    """
    one, other = plain_name(one), plain_name(other)
    if _is_path(one) == _is_path(other):
        return one == other or (not _is_path(one) and one.casefold() == other.casefold())
    folder, name = (one, other) if _is_path(one) else (other, one)
    return "/" in name and folder.casefold().endswith("/" + name.casefold())


def alike(one: str, other: str) -> bool:
    """Whether two names may mean one model: the last parts are the same, and they are not two folders.

    What says that a model is quantized, as in "Qwen3-8B-AWQ" and "Qwen3-8B-FP8-dynamic", does not count.
    """
    one, other = plain_name(one), plain_name(other)
    two_folders = _is_path(one) and _is_path(other)
    return not two_folders and unquantized(Path(one).name) == unquantized(Path(other).name)


def last_part(name: str) -> str:
    """The last part of a model's name in small letters, by which its folder is known."""
    return Path(plain_name(name)).name.casefold()


def unquantized(name: str) -> str:
    """The last part of a model's name in small letters, without what says at its end how it is quantized."""
    return QUANTIZED.sub("", name.casefold()) or name.casefold()


def file_name(model_name: str, rope: str = "") -> str:
    """Name of a model's dictionary file; two models never have the same.

    "Qwen/Qwen2.5-7B" -> "Qwen_Qwen2.5-7B.safetensors". A hash of the whole name follows where that can be read in two
    ways, and for a folder: "checkpoint@1a2b3c4d.safetensors".

    Args:
        model_name: of any kind.
        rope: the rotary embedding, as in `ModelFingerprint`, where it is not the model's own; a hash of it follows:
            "Qwen_Qwen2.5-7B+5e6f7a8b.safetensors".

    Raises:
        ValueError: no model can be called that.
    """
    check_name(model_name)
    plain = plain_name(model_name)
    org, suffix = plain.partition("/")[0], (f"+{_short_hash(rope)}" if rope else "") + ".safetensors"
    if re.fullmatch(f"(?:{HUB_PART}/)?{HUB_PART}", plain) and "_" not in org and len(plain) <= LONGEST_ID:
        return plain.replace("/", "_") + suffix
    readable = Path(plain).name if _is_path(plain) else plain
    stem = re.sub(r"[^A-Za-z0-9.-]+", "_", readable)[:LONGEST_ID] or "model"
    return f"{stem}@{_short_hash(plain)}{suffix}"


def hub_repository(model_name: str) -> str:
    """The repository that the project keeps a model's dictionary in: "vllm-lexico/Qwen_Qwen2.5-7B".

    Raises:
        ValueError: the model is none of the hub's, so that its name means nothing to others.
    """
    plain = plain_name(model_name)
    stem = Path(file_name(plain)).stem
    if not is_hub_id(plain) or "@" in stem:
        raise ValueError(
            f"the dictionary is of {printable(plain)}, which is no model's id on the hub that a repository could be "
            f"named after; allowed: org/name; name the repository, or train with --name ORG/MODEL"
        )
    return f"{HUB_OWNER}/{stem}"


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def train_command(model_name: str, overrides: str | None = "", max_model_len: int | None = None) -> str:
    """The shell command that makes a dictionary of this model.

    Args:
        model_name: of any kind.
        overrides: what is changed in its configuration, a JSON object; "" for nothing, None where it is a function's
            doing, which cannot be written down.
        max_model_len: tokens of the longest sequence that is served, where it decides how keys are turned, see
            `ModelFingerprint.short_context`; else None.
    """
    command = f"vllm-lexico train {shlex.quote(printable(plain_name(model_name)))}"
    if max_model_len is not None:
        command += f" --max-model-len {max_model_len}"
    if overrides is None:
        return f"{command} --hf-overrides JSON, where JSON says what your function hf_overrides changes"
    return f"{command} --hf-overrides {shlex.quote(overrides)}" if overrides else command
