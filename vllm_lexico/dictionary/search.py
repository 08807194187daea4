"""Where dictionaries are looked for: a file or hub id that the user names, the package, the user's cache, the hub."""

import logging
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from lexico_kernels.files import cache_folder

from vllm_lexico.dictionary.file import DictionaryInfo, ModelFingerprint, read_info
from vllm_lexico.dictionary.names import file_name, is_hub_id, same_model, train_command

logger = logging.getLogger("vllm.lexico")

HUB_FILE = "dictionary.safetensors"
HUB_OWNER = "vllm-lexico"
HUB_TIMEOUT_SECONDS = 3.0


def bundled_folder() -> Path:
    """Dictionaries that come with the package; in a source checkout the repository's `dictionaries` folder."""
    spec = find_spec("vllm_lexico.bundled")  # not importlib.resources: it has no one path for a folder without __init__
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    return Path(__file__).resolve().parents[2] / "dictionaries"


class DictionaryNotFoundError(ValueError):
    """No dictionary for a model in any place that was searched; says which and how to make one."""


def hub_repository(model_name: str) -> str:
    """Where a hub model's dictionary is looked for without a setting: this project's repository for it on the hub."""
    return f"{HUB_OWNER}/{file_name(model_name).removesuffix('.safetensors')}"


def find_dictionary(setting: str | None, model_name: str, fingerprint: ModelFingerprint) -> Path:
    """Path of the dictionary file for a model; only headers are read.

    setting: a file, or a hub id "org/name" or "org/name/file.safetensors"; with it nothing else is looked at. Without:
    a dictionary of this very model that is bundled, in the user's cache or on the hub; then one of a model of the same
    fingerprint (a fine-tune, say) that is bundled or in the cache; DictionaryNotFoundError if none is. A setting that
    leads nowhere is a ValueError.
    """
    if setting is not None:
        return _from_setting(setting)
    bundled, cached = bundled_folder(), cache_folder()
    twins = [(path, info) for path, info in _dictionaries_in(bundled, cached) if info.fingerprint == fingerprint]
    for path, info in twins:
        if same_model(info.model_name, model_name):
            return path
    downloaded, hub_note = _from_hub(model_name)
    if downloaded is not None:
        return downloaded
    if twins:
        return twins[0][0]
    raise DictionaryNotFoundError(
        f"no dictionary for {model_name}. Searched: bundled ({bundled}); the user's cache ({cached}); {hub_note}. "
        f"Make one (some minutes on a GPU): {train_command(model_name)}"
    )


def _dictionaries_in(*folders: Path) -> Iterator[tuple[Path, DictionaryInfo]]:
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            try:
                yield path, read_info(path)
            except ValueError as error:
                logger.warning("passed over while looking for a dictionary: %s", error)


def _from_setting(setting: str) -> Path:
    path = Path(setting).expanduser()
    if path.is_file():
        return path
    parts = setting.split("/")
    hub_like = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/.+\.safetensors)?", setting)
    if not hub_like or (len(parts) == 2 and parts[1].endswith(".safetensors")):
        raise ValueError(
            f"dictionary {setting!r} is not a file that exists; give a path to a file, a hub id (org/name or "
            f"org/name/file.safetensors), or nothing to have one looked for"
        )
    try:
        return _download("/".join(parts[:2]), "/".join(parts[2:]) or HUB_FILE)
    except Exception as error:  # whatever the hub client raises, the user named this and must hear why it failed
        raise ValueError(
            f"dictionary {setting!r} is no file and could not be had from the hub ({_short(error)}); check the name "
            f"and the network, or give a path to a file"
        ) from error


def _from_hub(model_name: str) -> tuple[Path | None, str]:
    """(path, what was tried in words): a hub model's dictionary under this project's name on the hub, if any."""
    if not is_hub_id(model_name):
        return None, f"not the Hugging Face hub ({model_name} is a path)"
    repo = hub_repository(model_name)
    try:
        if _answers(repo, HUB_FILE):
            return _download(repo, HUB_FILE), ""
        return None, f"the Hugging Face hub ({repo}: not there)"
    except Exception as error:  # no network, no such repository, offline mode: none of them may stop the search
        return None, f"the Hugging Face hub ({repo}: {_short(error)})"


def _answers(repo: str, file: str) -> bool:
    """Whether the hub's cache or the hub has a file. One request: without network a download tries for long."""
    from huggingface_hub import get_session, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, file), str):
        return True
    return get_session().head(hf_hub_url(repo, file), timeout=HUB_TIMEOUT_SECONDS).status_code < 400


def _download(repo: str, file: str) -> Path:
    """Fetch from the hub, or from its cache when offline (HF_HUB_OFFLINE) or when the hub does not answer in time."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(repo, file, etag_timeout=HUB_TIMEOUT_SECONDS))


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
