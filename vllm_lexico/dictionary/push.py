"""Sharing a dictionary on the Hugging Face hub, where `dictionary.find_dictionary` loads it from."""

import re
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.fingerprint import ranges
from vllm_lexico.dictionary.info import DictionaryInfo
from vllm_lexico.dictionary.names import hub_repository, is_hub_id, printable, train_command
from vllm_lexico.dictionary.search import HUB_FILE

CARD = """\
---
library_name: vllm-lexico
{base_model}tags:
- vllm-lexico
- vllm
- kv-cache
- lexico
- sparse-coding
---

# Lexico dictionary of {model}

With this file [vLLM](https://github.com/vllm-project/vllm) keeps the KV cache of {model} as sparse codes, in a fraction
of the usual memory per token. It holds {atoms} atoms for the keys and as many for the values of each of {coded},
learned for the package `vllm-lexico` after the paper [Lexico](https://arxiv.org/abs/2412.08890).
It contains no weights of the model.

## Usage

    pip install vllm-lexico
    vllm serve {model} --attention-backend LEXICO{setting}

It fits only models of this shape: {shape}, rotary
embedding `{rope}`. Another model is refused when vLLM starts.

## Loss

{losses}

## Training

- data: {data}
- {vectors_seen:,} vectors per layer, of {tokens_seen:,} tokens of text, coded with {sparsity} atoms per vector
- {atom_bits} bits per number of an atom, seed {seed}, vllm-lexico {version}
{recipe}
Make your own, or adapt this one to your text:

    {command}
    {command} --continue-from dictionary.safetensors --data MY-TEXTS
"""


def model_card(info: DictionaryInfo, repo: str) -> str:
    """README.md of the repository `repo` (org/name) that holds the dictionary, in Markdown with the hub's header."""
    known = is_hub_id(info.model_name)
    recipe = "".join(f"- {name}: {words}\n" for name, words in info.recipe_words())
    model = Path(info.model_name).name if Path(info.model_name).is_absolute() else info.model_name
    setting = f' \\\n        --additional-config \'{{"lexico": {{"dictionary": "{repo}"}}}}\''
    texts = {"data": printable(info.data), "version": printable(info.version)}
    shape = info.fingerprint
    all_layers, some_layers = f"the {shape.num_layers} layers", f"the layers {ranges(shape.layers)}"
    return CARD.format(
        **vars(info) | texts | {"recipe": recipe},
        shape=shape.words(),
        rope=shape.rope,
        coded=all_layers if shape.all_layers else some_layers,
        model=model,
        command=train_command(info.model_name) if known else f"vllm-lexico train {model}",
        base_model=f"base_model: {info.model_name}\n" if known else "",
        setting=setting,
        losses=_losses(info),
    )


def _losses(info: DictionaryInfo) -> str:
    """Mean over the layers of the energy lost, a row per sparsity."""
    sparsities = sorted({int(sparsity) for of_kv in info.errors.values() for sparsity in of_kv})
    if not sparsities:
        return "It was not measured."
    kvs = list(info.errors)
    rows = ["Share of the vectors' energy on held-out text, mean of the layers:", ""]
    rows.append("| atoms per vector | " + " | ".join(f"{kv}s" for kv in kvs) + " |")
    rows.append("|---" * (1 + len(kvs)) + "|")
    for sparsity in sparsities:
        columns = [info.errors[kv].get(str(sparsity)) for kv in kvs]
        means = [f"{sum(lost) / len(lost):.4f}" if lost else "" for lost in columns]
        rows.append(f"| {sparsity} | " + " | ".join(means) + " |")
    return "\n".join(rows)


def push_dictionary(path: Path, repo: str | None = None, *, private: bool = False) -> tuple[str, str]:
    """Upload a dictionary file and its model card in one commit.

    Args:
        path: the file.
        repo: "org/name"; it is created where there is none. None for the project's own, see `hub_repository`.
        private: the repository must be private.

    Returns:
        The repository's name and its address.

    Raises:
        ValueError: the file is damaged, HF_HUB_OFFLINE switches the hub off, `repo` is no repository's name or holds a
            model, there is no token, a private upload would go into a public repository, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token

    dictionary = load_dictionary(path)
    repo = hub_repository(dictionary.info.model_name) if repo is None else repo
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
        raise ValueError(f"{repo!r} is no name of a repository on the hub; allowed: org/name, as in me/my-dictionary")
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{path} cannot be pushed while HF_HUB_OFFLINE is set; unset it")
    if not get_token():
        raise ValueError("there is no Hugging Face token; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="vllm-lexico")
    with TemporaryDirectory() as folder:
        info, upload = _without_folders(dictionary, path, Path(folder))
        try:
            url = api.create_repo(repo, private=private or None, exist_ok=True)
            refused = _refusal(api, repo, private)
            if not refused:
                card = model_card(info, repo).encode()
                additions = [CommitOperationAdd(HUB_FILE, str(upload)), CommitOperationAdd("README.md", card)]
                api.create_commit(repo, additions, commit_message=f"Add the Lexico dictionary of {info.model_name}")
        except Exception as error:  # whatever the hub client raises, the user asked for this
            raise ValueError(
                f"{path} could not be pushed to {repo} ({type(error).__name__}: {' '.join(str(error).split())}); check "
                f"the name, the network, and that your token may write there"
            ) from error
    if refused:
        raise ValueError(refused)
    return repo, str(url)


def _refusal(api: Any, repo: str, private: bool) -> str:
    """Why nothing may be pushed to a repository that is there; "" if it may."""
    if api.file_exists(repo, "config.json"):
        return (
            f"{repo} holds a model, whose card would be replaced and whose weights vLLM would take the dictionary for, "
            f"so nothing was pushed; name a repository for the dictionary alone, as in {repo}-lexico"
        )
    if private and not api.model_info(repo).private:
        return f"{repo} exists and is public, so nothing was pushed; make it private, or leave out --private"
    return ""


def _without_folders(dictionary: Dictionary, path: Path, folder: Path) -> tuple[DictionaryInfo, Path]:
    """The file as it is, or a copy in `folder` whose model is called by its folder's own name.

    Where a model lies on the user's disk is nobody else's business.
    """
    name = Path(dictionary.info.model_name)
    if not name.is_absolute():
        return dictionary.info, path
    renamed = replace(dictionary, info=replace(dictionary.info, model_name=name.name or "model"))
    renamed.save(folder / HUB_FILE)
    return renamed.info, folder / HUB_FILE
