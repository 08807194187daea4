"""Small files of the Hugging Face hub: out of its cache, else fetched, and one sentence where they cannot be had."""

from __future__ import annotations

from pathlib import Path

TIMEOUT_SECONDS = 5.0


def fetch(repo: str, file: str, *, kind: str = "model", remedy: str) -> Path:
    """A file of a repository, out of the hub's cache or else of the hub.

    Args:
        repo: "org/name".
        file: its path in the repository.
        kind: "model" or "dataset".
        remedy: what to do where the hub has it not or does not answer, as a clause.

    Raises:
        ValueError: in one sentence, why it cannot be had.
    """
    from huggingface_hub import get_session, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(cached := try_to_load_from_cache(repo, file, repo_type=kind), str):
        return Path(cached)
    login = "log in with `hf auth login`"
    try:
        # One request first: without network a download tries for half a minute.
        get_session().head(hf_hub_url(repo, file, repo_type=kind), timeout=TIMEOUT_SECONDS)
        return Path(hf_hub_download(repo, file, repo_type=kind, etag_timeout=TIMEOUT_SECONDS))
    except GatedRepoError as error:
        reason = "is for those who accepted its terms: accept them on its page, and"
        raise ValueError(f"the {kind} {repo} {reason} {login}, or {remedy}") from error
    except RepositoryNotFoundError as error:
        reason = "is not on the Hugging Face hub, or is private: check its name,"
        raise ValueError(f"the {kind} {repo} {reason} {login}, or {remedy}") from error
    except OfflineModeIsEnabled as error:
        reason = "is not in the hub's cache, and HF_HUB_OFFLINE is set: unset it, or"
        raise ValueError(f"{file} of the {kind} {repo} {reason} {remedy}") from error
    except Exception as error:  # what the client raises for a hub that does not answer is of many kinds
        # A hub that is overloaded or limits requests has no answer either, which the client calls a missing entry.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ValueError(f"the {kind} {repo} has no {file} on the Hugging Face hub; {remedy}") from error
        words = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise ValueError(
            f"{file} of the {kind} {repo} is not in the hub's cache, and the Hugging Face hub does not answer "
            f"({words}): go online once, or {remedy}"
        ) from error
