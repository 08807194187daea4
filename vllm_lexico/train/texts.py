"""Training text: local files as sequences of token ids, or text that the model writes itself."""

import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

CHARACTERS_A_TOKEN = 6  # generous: a piece of text this much longer than a sequence nearly always fills it
SUFFIXES = (".txt", ".jsonl", ".jsonl.xz")
_ALLOWED = f"files that end in {', '.join(SUFFIXES)} and folders of them"


def read_documents(source: Path) -> list[str]:
    """Texts of one file or folder: a .txt is one, a .jsonl or .jsonl.xz has one a line in its field "text"."""
    if source.is_dir():
        files = [path for path in sorted(source.rglob("*")) if path.name.endswith(SUFFIXES)]
        documents = [text for path in files for text in read_documents(path)]
    elif source.name.endswith(".txt") and source.is_file():
        documents = [source.read_text(encoding="utf-8", errors="replace")]
    elif source.name.endswith(SUFFIXES) and source.is_file():
        documents = _read_lines(source)
    else:
        raise ValueError(f"--data {source} is not text; allowed: {_ALLOWED}")
    documents = [text for text in documents if text.strip()]
    if not documents:
        raise ValueError(f"--data {source} has no text; allowed: {_ALLOWED}")
    return documents


def _read_lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
        lines = (lzma.decompress(content) if path.name.endswith(".xz") else content).decode().split("\n")
        return [json.loads(line)["text"] for line in lines if line.strip()]
    except (ValueError, KeyError, TypeError, lzma.LZMAError) as error:
        raise ValueError(
            f"{path} cannot be read ({error!r}); "
            f'allowed: one JSON object with a "text" field a line; mend it or leave it out'
        ) from error


def sequences_from_files(sources: list[Path], tokenizer: Any, length: int, count: int, seed: int) -> torch.Tensor:
    """int64 [count, length] token ids, taken from the sources in turn, so that each counts the same whatever its size.

    A document gives one piece from a random place; short ones are joined, parted by the end-of-text token. A source
    that runs out starts again (other places are then read).
    """
    streams = []
    for at, source in enumerate(sources):
        streams.append(_pieces(read_documents(source), length, random.Random(f"{seed}/{at}")))
    sequences = torch.empty(count, length, dtype=torch.int64)
    for row in range(count):
        ids: list[int] = []
        while len(ids) < length:
            ids += tokenizer(next(streams[row % len(streams)]), truncation=False)["input_ids"]
            if tokenizer.eos_token_id is not None:
                ids.append(tokenizer.eos_token_id)
        sequences[row] = torch.tensor(ids[:length])
    return sequences


def _pieces(documents: list[str], length: int, rng: random.Random) -> Iterator[str]:
    piece = length * CHARACTERS_A_TOKEN
    while True:
        for text in rng.sample(documents, len(documents)):
            start = rng.randrange(max(1, len(text) - piece // 2))
            yield text[start : start + piece]


@torch.no_grad()
def sequences_from_model(model: Any, length: int, count: int, seed: int, batch: int) -> torch.Tensor:
    """int64 [count, length] token ids that the model samples itself at temperature 1, each from a random first token.

    The start token, where the model has one, comes before it. Needs no data and no tokenizer.
    """
    torch.manual_seed(seed)
    start = model.config.bos_token_id
    parts = []
    for at in range(0, count, batch):
        rows = min(batch, count - at)
        prompt = torch.randint(model.config.vocab_size, (rows, 1), device=model.device)
        if start is not None:
            prompt = torch.cat((torch.full_like(prompt, start), prompt), 1)
        sampled = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=length - prompt.shape[1],
            max_new_tokens=length - prompt.shape[1],
        )
        parts.append(sampled[:, :length].cpu())
    return torch.cat(parts)
