"""Where dictionaries are looked for: a file or hub id that the user names, the user's cache, the package, the hub."""

import json
import logging
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from lexico_kernels.files import cache_folder

from vllm_lexico.dictionary.file import read_info
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.info import DictionaryInfo
from vllm_lexico.dictionary.names import (
    alike,
    last_part,
    plain_name,
    printable,
    same_model,
    train_command,
    unquantized,
)
from vllm_lexico.errors import refusal

logger = logging.getLogger("vllm.lexico")

HUB_FILE = "dictionary.safetensors"  # of a repository on the hub
HUB_LIST = "hub.json"  # of the bundled folder: which repositories are asked without a setting
HUB_TIMEOUT_SECONDS = 3.0

Found = tuple[Path, DictionaryInfo]


class DictionaryNotFoundError(ValueError):
    """No dictionary for a model in any place that was searched, or several and none of its own; says what to do."""


def bundled_folder() -> Path:
    """Dictionaries that come with the package; in a source checkout the repository's `dictionaries` folder."""
    spec = find_spec("vllm_lexico.bundled")  # not importlib.resources: it has no one path for a folder without __init__
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).resolve().parents[2] / "dictionaries"


def find_dictionary(
    setting: str | None, model_name: str, fingerprint: ModelFingerprint, overrides: str | None = ""
) -> Path:
    """Path of the dictionary file for a model; only headers are read.

    Args:
        setting: a file, or a hub id "org/name" or "org/name/file.safetensors"; with it nothing else is looked at.
            Without: a dictionary of this very model that is in the user's cache, bundled, or on the hub where the
            package lists it; then one that is in the cache or bundled and has the same fingerprint: first of a model
            whose name ends alike, then of any (a fine-tune's original, say). Of several models' none is taken. What
            the user made comes before what is bundled.
        model_name: as vLLM was given it.
        fingerprint: the model's.
        overrides: of its configuration, see `train_command`.

    Raises:
        DictionaryNotFoundError: there is none, or several of other models fit.
        ValueError: the setting leads nowhere.
    """
    if setting is not None:
        return _from_setting(setting)
    bundled, cached = bundled_folder(), cache_folder()
    there = list(_dictionaries_in(cached, bundled))
    fitting = [found for found in there if found[1].fingerprint == fingerprint]
    for path, info in fitting:
        if same_model(info.model_name, model_name):
            return path
    downloaded, hub_note = _from_hub(model_name)
    if downloaded is not None:
        return downloaded
    likely = _likely(fitting, model_name)
    if len({plain_name(info.model_name).casefold() for _, info in likely}) == 1:
        return likely[0][0]
    if likely:
        raise DictionaryNotFoundError(
            _several(likely, train_command(model_name, overrides, fingerprint.short_context), model_name)
        )
    own = [found for found in there if same_model(found[1].model_name, model_name)]
    raise DictionaryNotFoundError(
        f"no dictionary for {printable(model_name)}{_as_it_is_served(own, fingerprint)}. Searched: the user's cache "
        f"({cached}); bundled ({bundled}); {hub_note}. Name one that you have, a file or org/name on the hub, or make "
        f"one (some minutes on a GPU): {train_command(model_name, overrides, fingerprint.short_context)}"
    )


def _likely(fitting: list[Found], model_name: str) -> list[Found]:
    """Of dictionaries that fit those of a model with this name, else of one that is quantized otherwise; else all.

    Of several quantized twins' the one that is not quantized is taken, of which they were made.
    """
    twins, own = [found for found in fitting if alike(found[1].model_name, model_name)], last_part(model_name)
    for name in (own, unquantized(own)):
        if same := [found for found in twins if last_part(found[1].model_name) == name]:
            return same
    return twins or fitting


def _as_it_is_served(own: list[Found], fingerprint: ModelFingerprint) -> str:
    """In words, how the model as it is served differs from what its own dictionaries are for."""
    differences = ["; ".join([f"{path} differs", *info.fingerprint.differences(fingerprint)]) for path, info in own]
    return f" as it is served ({'. '.join(differences)})" if own else ""


def _several(fitting: list[Found], command: str, model_name: str) -> str:
    listed = ", ".join(f"{info.model_name} ({path})" for path, info in fitting)
    setting = json.dumps({"lexico": {"dictionary": str(fitting[0][0])}})
    return (
        f"no dictionary for {printable(model_name)}, and those of several other models fit its shape: {listed}. Name "
        f"one, as in --additional-config '{setting}', or make its own (some minutes on a GPU): {command}"
    )


def _dictionaries_in(*folders: Path) -> Iterator[Found]:
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            try:
                yield path, read_info(path)
            except ValueError as error:
                logger.warning("passed over while looking for a dictionary: %s", error)


def _from_setting(setting: str) -> Path:
    path = Path(setting).expanduser()
    kind = _kind(path)
    if kind == "file":
        return path
    subject, allowed = "dictionary", "a file, or a hub id (org/name or org/name/file.safetensors)"
    if kind == "folder":
        files = sorted(file.name for file in path.glob("*.safetensors"))
        remedy = f"name the file in it, {path / files[0]}" if files else "it holds no dictionary, so name another"
        raise ValueError(refusal(subject, setting, f"{allowed}, and this is a folder", remedy))
    parts = setting.split("/")
    hub_like = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/.+\.safetensors)?", setting)
    in_a_folder = len(parts) > 2 and _kind(path.parent) == "folder"
    if not hub_like or in_a_folder or (len(parts) == 2 and parts[1].endswith(".safetensors")):
        remedy = "this is not a file that exists: correct the path, or leave it out to have one looked for"
        raise ValueError(refusal(subject, setting, allowed, remedy))
    try:
        return _download("/".join(parts[:2]), "/".join(parts[2:]) or HUB_FILE)
    except Exception as error:  # whatever the hub client raises, the user named this and must hear why it failed
        raise ValueError(
            f"dictionary {setting!r} is no file and could not be had from the hub ({_short(error)}); check the name "
            f"and the network, or give a path to a file"
        ) from error


def _kind(path: Path) -> str:
    try:
        return "file" if path.is_file() else "folder" if path.is_dir() else "absent"
    except OSError:  # a name that is too long
        return "absent"


def _from_hub(model_name: str) -> tuple[Path | None, str]:
    """(path, what was tried in words): a dictionary on the hub that the package lists for the model, if any.

    Anybody may own a name on the hub, so nothing is asked for but what is listed, at the commit that is listed.
    """
    listed = {name.casefold(): entry for name, entry in _listed_on_hub().items()}
    entry = listed.get(plain_name(model_name).casefold())
    if entry is None:
        return None, "not the Hugging Face hub, where this release knows of none for it"
    repo, revision = entry["repository"], entry["revision"]
    try:
        if _answers(repo, HUB_FILE, revision):
            return _download(repo, HUB_FILE, revision), ""
        return None, f"the Hugging Face hub ({repo}: not there)"
    except Exception as error:  # no network, no such repository, offline mode: none of them may stop the search
        return None, f"the Hugging Face hub ({repo}: {_short(error)})"


def _listed_on_hub() -> dict[str, dict[str, str]]:
    """Model -> {"repository": "org/name", "revision": a commit's hash}."""
    path = bundled_folder() / HUB_LIST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _answers(repo: str, file: str, revision: str) -> bool:
    """Whether the hub's cache or the hub has a file. One request: without network a download tries for long."""
    from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, file, revision=revision), str):
        return True
    url = hf_hub_url(repo, file, revision=revision)
    return get_session().head(url, timeout=HUB_TIMEOUT_SECONDS).status_code < 400


def _download(repo: str, file: str, revision: str | None = None) -> Path:
    """Fetch from the hub, or from its cache when offline (HF_HUB_OFFLINE) or when the hub does not answer in time.

    revision: a commit's hash, or None for the newest. Which one was taken is logged.
    """
    from huggingface_hub import hf_hub_download

    path = Path(hf_hub_download(repo, file, revision=revision, etag_timeout=HUB_TIMEOUT_SECONDS))
    commit = re.search(r"/snapshots/([0-9a-f]+)/", path.as_posix())
    logger.info("dictionary from the Hugging Face hub: %s of %s, revision %s", file, repo, commit[1] if commit else "?")
    return path


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
