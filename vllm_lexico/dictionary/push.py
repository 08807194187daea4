"""Sharing a dictionary on the Hugging Face hub, where `dictionary.find_dictionary` loads it from."""

import re
from pathlib import Path

from vllm_lexico.dictionary.file import DictionaryInfo, load_dictionary
from vllm_lexico.dictionary.names import is_hub_id
from vllm_lexico.dictionary.search import HUB_FILE, hub_repository

CARD = """\
---
library_name: vllm-lexico
{base_model}tags:
- vllm
- kv-cache
- lexico
- sparse-coding
---

# Lexico dictionary of {model}

With this file [vLLM](https://github.com/vllm-project/vllm) keeps the KV cache of {model} as sparse codes: a token takes
a fraction of its usual memory. It holds {atoms} atoms for the keys and as many for the values of each of the
{num_layers} layers, learned for the package `vllm-lexico` after the paper [Lexico](https://arxiv.org/abs/2412.08890).
It contains no weights of the model.

## Use it

    pip install vllm-lexico
    vllm serve {model} --attention-backend LEXICO{setting}

It fits models of this shape alone: {model_type}, {num_layers} layers, {num_kv_heads} KV heads of {head_dim}, rotary
embedding `{rope}`. Another model is refused when vLLM starts.

## What it loses

{losses}

## How it was made

- data: {data}
- {vectors_seen:,} vectors a layer, of {tokens_seen:,} tokens of text, coded with {sparsity} atoms a vector
- {atom_bits} bits a number of an atom, seed {seed}, vllm-lexico {version}
"""


def model_card(info: DictionaryInfo, repo: str) -> str:
    """README.md of the repository `repo` (org/name) that holds the dictionary, in Markdown with the hub's header."""
    known = is_hub_id(info.model_name)
    found_by_itself = known and repo == hub_repository(info.model_name)
    setting = f' \\\n        --additional-config \'{{"lexico": {{"dictionary": "{repo}"}}}}\''
    return CARD.format(
        **vars(info) | vars(info.fingerprint),
        model=info.model_name if known else Path(info.model_name).name,
        base_model=f"base_model: {info.model_name}\n" if known else "",
        setting="" if found_by_itself else setting,
        losses=_losses(info),
    )


def _losses(info: DictionaryInfo) -> str:
    """Mean over the layers of the energy lost, a row for each sparsity."""
    sparsities = sorted({int(sparsity) for of_part in info.errors.values() for sparsity in of_part})
    if not sparsities:
        return "It was not measured."
    parts = list(info.errors)
    rows = ["Share of the vectors' energy on held-out text, mean of the layers:", ""]
    rows.append("| atoms a vector | " + " | ".join(f"{kv}s" for kv in parts) + " |")
    rows.append("|---" * (1 + len(parts)) + "|")
    for sparsity in sparsities:
        columns = [info.errors[kv].get(str(sparsity)) for kv in parts]
        means = [f"{sum(lost) / len(lost):.4f}" if lost else "" for lost in columns]
        rows.append(f"| {sparsity} | " + " | ".join(means) + " |")
    return "\n".join(rows)


def push_dictionary(path: Path, repo: str, *, private: bool = False) -> str:
    """Upload a dictionary file and its model card in one commit; returns the address of the repository.

    repo: "org/name"; it is made where there is none. private: the repository must be private.
    ValueError when the file is damaged, `repo` is no repository's name, there is no token, a private upload would go
    into a public repository, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    info = load_dictionary(path).info
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", repo):
        raise ValueError(f"{repo!r} is no name of a repository on the hub; allowed: org/name, as in me/my-dictionary")
    if not get_token():
        raise ValueError("there is no Hugging Face token; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="vllm-lexico")
    try:
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        open_to_all = private and not api.model_info(repo).private
        if not open_to_all:
            card = model_card(info, repo).encode()
            additions = [CommitOperationAdd(HUB_FILE, str(path)), CommitOperationAdd("README.md", card)]
            api.create_commit(repo, additions, commit_message=f"Add the Lexico dictionary of {info.model_name}")
    except Exception as error:  # whatever the hub client raises, the user asked for this and must hear why it failed
        raise ValueError(
            f"{path} could not be pushed to {repo} ({type(error).__name__}: {' '.join(str(error).split())}); check the "
            f"name, the network, and that your token may write there"
        ) from error
    if open_to_all:
        raise ValueError(f"{repo} exists and is public, so nothing was pushed; make it private, or leave out --private")
    return str(url)
