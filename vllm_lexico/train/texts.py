"""Training text as sequences of token ids: local files and datasets of the hub."""

import hashlib
import json
import lzma
import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

CHARACTERS_PER_TOKEN = 6  # generous: a piece of text this much longer than a sequence nearly always fills it
SUFFIXES = (".txt", ".jsonl", ".jsonl.xz")
TWENTY = 20  # one text in so many is held out
LONG_TEXT = 50_000  # characters
SHUFFLED_DOCUMENTS = 1000  # of a dataset are held at a time, to be taken in random order
_ALLOWED = f"files that end in {', '.join(SUFFIXES)} and folders of them"
_ALLOWED_LINES = 'allowed: one JSON object with a "text" field per line; fix it or leave it out'
_DATASET = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+){0,2}")


def check_source(name: str) -> None:
    """Refuse what neither exists as a path nor can be a dataset's name. Asks no network.

    Raises:
        ValueError: with what is allowed.
    """
    if name and is_path(name):
        return
    if name.endswith(SUFFIXES) or not _DATASET.fullmatch(name):
        raise ValueError(
            f"--data is {name or repr(name)}; allowed: files and folders that exist, or a Hugging Face dataset as "
            f"org/name, org/name:config or org/name:config:split; change it"
        )
    _datasets(name)


def is_path(name: str) -> bool:
    """Whether a source is a file or folder here."""
    try:
        return Path(name).exists()
    except (ValueError, OSError):  # a null character, or a name longer than the system takes
        return False


def _datasets(name: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"--data {name} is no path that exists, and to read it as a Hugging Face dataset the package datasets is "
            f"needed ({error}); run `pip install datasets`, or give files and folders"
        ) from error
    return datasets


def read_documents(source: Path) -> list[str]:
    """Texts of one file or folder: a .txt is one, a .jsonl or .jsonl.xz has one per line in its field "text".

    Raises:
        ValueError: it is no text, has none, or a line cannot be read; the line is named.
    """
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
    except (ValueError, lzma.LZMAError) as error:
        raise ValueError(f"{path} cannot be read ({error}); {_ALLOWED_LINES}") from error
    return [_text_of(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number}, cannot be read ({error}); {_ALLOWED_LINES}") from error
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{path}, line {number}, has no "text" that is a string; {_ALLOWED_LINES}')
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError(f"{path}, line {number}, has half a character (a lone surrogate); {_ALLOWED_LINES}")
    return text


def read_dataset(name: str, seed: int, held_out: bool | None = None, *, once: bool = False) -> Iterator[str]:
    """Texts of a Hugging Face dataset, streamed, each pass over it in another random order.

    Args:
        name: "org/name", "org/name:config" or "org/name:config:split" (split: train); its rows need a field "text".
        seed: of the order.
        held_out: one text in TWENTY, picked by its checksum, or the others; None for all, and so after a pass that met
            none of the wanted ones.
        once: end after one pass; else it goes on without end.

    Raises:
        ValueError: it cannot be had, has no such field, or no text.
    """
    datasets = _datasets(name)
    path, config, split = [*name.split(":"), None, None][:3]
    try:
        dataset = datasets.load_dataset(path, config, split=split or "train", streaming=True)
        every = held_out is None
        while True:
            texts = taken = 0
            for row in dataset.shuffle(seed=seed, buffer_size=SHUFFLED_DOCUMENTS):
                if not isinstance(row.get("text"), str):
                    raise ValueError(f"a row has the fields {', '.join(row)}, and none of them is a text named text")
                if row["text"].strip():
                    texts += 1
                    if every or (zlib.crc32(row["text"].encode()) % TWENTY == 0) == held_out:
                        taken += 1
                        yield row["text"]
            if not texts:
                raise ValueError("there is no text in it")
            if once:
                return
            every = every or not taken
            seed += 1
    except Exception as error:  # whatever the library raises, the user named this and must hear why it failed
        raise ValueError(
            f"--data {name} cannot be read as a Hugging Face dataset ({type(error).__name__}: {error}); check the "
            f"name, configuration and split, and the network, or give files and folders"
        ) from error


class TextSequences:
    """Sequences of token ids from several sources in turn, so that each counts the same whatever its size.

    One text in TWENTY is held out: it is in the held-out sequences and in no others, except where a source has too few
    texts to spare one. A text gives one piece from a random place; short ones are joined, parted by the end-of-text
    token. A source that runs out starts again (other places are then read).

    Args:
        sources: files and folders, or names of datasets as in `read_dataset`.
        tokenizer: of transformers.
        length: tokens per sequence.
        seed: of places and order.
        documents: more sources, by name: texts that were read already.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: Any,
        length: int,
        seed: int,
        *,
        documents: Mapping[str, list[str]] = MappingProxyType({}),
    ) -> None:
        self.tokenizer, self.length, self.seed = tokenizer, length, seed
        self._documents = {name: _parts(read_documents(Path(name))) for name in sources if is_path(name)}
        self._documents |= {name: _parts(texts) for name, texts in documents.items()}
        self._sources = [*sources, *documents]

    def identity(self) -> dict[str, str]:
        """SHA-256 of each source's texts; of a dataset, of the first ones, in the order of this seed.

        Raises:
            ValueError: a source has too little text for one sequence, or cannot be read.
        """
        return {name: self._identify(name) for name in self._sources}

    def _identify(self, name: str) -> str:
        digest, tokens, of_file = hashlib.sha256(), 0, name in self._documents
        for text in self._documents[name] if of_file else read_dataset(name, self.seed, once=True):
            digest.update(text.encode() + b"\0")
            if tokens < self.length:
                tokens += len(self._tokenize(text[:LONG_TEXT]))
            elif not of_file:
                break
        if tokens < self.length:
            raise ValueError(
                f"--data {name} has {tokens} tokens; allowed: {self.length} or more, a whole sequence; add text, or "
                f"lower --sequence-tokens"
            )
        return digest.hexdigest()

    def take(self, count: int, number: int | None) -> torch.Tensor:
        """int64 [count, length]: sequences of round `number`, the same on every call; the held-out ones for None."""
        streams = [self._pieces(at, number) for at in range(len(self._sources))]
        sequences = torch.empty(count, self.length, dtype=torch.int64)
        for row in range(count):
            ids: list[int] = []
            while len(ids) < self.length:
                ids += self._tokenize(next(streams[row % len(streams)]))
                if self.tokenizer.eos_token_id is not None:
                    ids.append(self.tokenizer.eos_token_id)
            sequences[row] = torch.tensor(ids[: self.length])
        return sequences

    def _tokenize(self, text: str) -> list[int]:
        """All of a text; no warning where it is longer than the model's context, since it is cut into sequences."""
        ids: list[int] = self.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        return ids

    def _pieces(self, at: int, number: int | None) -> Iterator[str]:
        name, piece = self._sources[at], self.length * CHARACTERS_PER_TOKEN
        rng = random.Random(f"{self.seed}/{number}/{at}")
        if name in self._documents:
            documents = self._documents[name]
            if len(documents) >= TWENTY:
                documents = [text for row, text in enumerate(documents) if (row % TWENTY == 0) == (number is None)]
            texts = _repeated(documents, rng)
        else:
            texts = read_dataset(name, rng.randrange(1 << 30), held_out=number is None)
        for text in texts:
            start = rng.randrange(max(1, len(text) - piece // 2))
            yield text[start : start + piece]


def _parts(documents: list[str]) -> list[str]:
    """The documents, long ones cut, so that even one book can hold out a part."""
    return [text[at : at + LONG_TEXT] for text in documents for at in range(0, len(text), LONG_TEXT)]


def _repeated(documents: list[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(documents, len(documents))
