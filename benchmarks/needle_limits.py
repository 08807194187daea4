"""Where codes lose a needle: questions read a long text from codes, of all of it or of a part, or from ideal ones.

    python benchmarks/needle_limits.py Qwen/Qwen2.5-Coder-1.5B-Instruct --data DATA --dictionary FILE --sparsity 7

As the evaluation asks (`vllm_lexico/evals/needle.py`): a text with four passwords is computed exactly, and every
question after it reads the text as a cache would give it back. No engine, so that what is coded can be chosen. Ways:

  exact             the vectors as they are
  sparsity S        the product's codes, of each --sparsity
  keys, values      S codes of these alone, the others exact
  all but needles   S codes, the tokens of the passwords' sentences exact: what knowing where to look would buy
  needles alone     S codes of these tokens, all others exact
  ideal             the best code of a Gaussian of the vectors' own mean and covariance, of as many bytes as S atoms

An ideal code is drawn rather than made: by rate-distortion theory (Cover and Thomas, Elements of Information Theory,
section 10.3.3) what it gives back differs from the vector as if noise had been added along each eigenvector, and what
varies less than the noise is gone. No quantizer of one vector at a time reaches it, so it says what another format
could find at most, as far as vectors are Gaussian. They are taken as the product takes them: centred, stretched, and
made longer by the same gain.

Prints the share of whole passwords that greedy decoding would say, the loss of their first piece in nats, and the share
of energy lost. Rows go to benchmarks/results/needle_limits.jsonl, metric `found`, peer exact.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import torch
from bench.coded_model import CodedPerplexity
from bench.record import RESULTS, record
from bench.vector_codecs import DictionaryCodec, VectorCodec, dictionary_means
from lexico_kernels.memory.layout import KV, CodeLayout
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from vllm_lexico.dictionary.file import GAINS, Dictionary, load_dictionary
from vllm_lexico.evals.settings import NeedleSettings
from vllm_lexico.evals.tasks.needle import DATA_FILES, NEEDLE, Builder, Document
from vllm_lexico.train.texts import read_documents

SEED = 77  # other passwords than the evaluation's
BISECTIONS = 60
History = list[tuple[Tensor, Tensor]]  # keys and values [tokens, Hk, D] of each layer


class Reader(CodedPerplexity):
    """A model that computes a text, and then answers from a history of its keys and values that it is given."""

    def __init__(self, model_path: str, device: torch.device | str, window: int) -> None:
        self._history: History = []
        self._reads = False
        super().__init__(model_path, device, window=window)

    @torch.no_grad()
    def compute(self, ids: list[int]) -> History:
        """Exact keys and values of a text."""
        self._history, self._reads = [], False
        self._run(self.model.base_model, torch.tensor(ids, device=self.device)[None])
        return self._history

    @torch.no_grad()
    def answer(self, ids: list[int], count: int, history: History) -> Tensor:
        """Log probabilities [count, vocabulary] of the last `count` of `ids`, which go on from `history`."""
        self._history, self._reads = history, True
        at = torch.arange(len(ids), device=self.device)[None] + len(history[0][0])
        model = partial(self.model.base_model, position_ids=at)
        hidden = self._run(model, torch.tensor(ids, device=self.device)[None]).last_hidden_state[0]
        return self.model.get_output_embeddings()(hidden[-1 - count : -1]).float().log_softmax(-1)

    @torch.no_grad()
    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """As `CodedPerplexity`, with the history before what is computed."""
        past = 0
        if self._reads:
            past = len(self._history[layer][0])
            key, value = (
                torch.cat((old.transpose(0, 1)[None], new), 2)
                for old, new in zip(self._history[layer], (key, value), strict=True)
            )
        else:
            self._history.append((key[0].transpose(0, 1).contiguous(), value[0].transpose(0, 1).contiguous()))
        if not past:
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        groups = query.shape[1] // key.shape[1]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril(past)
        key, value = (kv.repeat_interleave(groups, 1) for kv in (key, value))
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


class IdealCodec(VectorCodec):
    """What the best code of Gaussian vectors gives back, see the module.

    dictionary: its means and stretch. vectors: [layers][2] of [tokens, Hk, D], which covariances are taken from.
    bits: of a vector. device: where vectors are.
    """

    def __init__(self, dictionary: Dictionary, vectors: list[list[Tensor]], bits: float, device: torch.device) -> None:
        super().__init__(dictionary_means(dictionary, device))
        self.vector_bytes = dict.fromkeys(KV, bits / 8)
        self.stretch = torch.stack([dictionary.tensors[f"{kv}_stretch"] for kv in KV], 1).float().to(device)
        self._random = torch.Generator(device).manual_seed(0)
        self._spectra = {
            (layer, kv): self._spectrum(layer, kv, of_part, bits)
            for layer, of_layer in enumerate(vectors)
            for kv, of_part in zip(KV, of_layer, strict=True)
        }

    def _plain(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        """float32 [Hk, tokens, D], centred and divided by the stretch."""
        at = layer, KV.index(kv)
        return ((vectors.float() - self.means[at]) / self.stretch[at]).transpose(0, 1)

    def _spectrum(self, layer: int, kv: str, vectors: Tensor, bits: float) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvectors [Hk, D, D], variances along them [Hk, D] and what of each is lost [Hk, D]."""
        plain = self._plain(layer, kv, vectors)
        variance, axes = torch.linalg.eigh(plain.transpose(1, 2) @ plain / plain.shape[1])
        variance = variance.clamp(min=1e-9)
        return axes, variance, torch.stack([water_filling(of_head, bits) for of_head in variance])

    def read_back(self, layer: int, kv: str, vectors: Tensor) -> Tensor:
        axes, variance, lost = self._spectra[layer, kv]
        kept = (1 - lost / variance)[:, None]
        along = self._plain(layer, kv, vectors) @ axes
        noise = torch.randn(along.shape, generator=self._random, device=along.device)
        read = kept * along + (kept * lost[:, None]).sqrt() * noise
        longer = (1 - lost.sum(1) / variance.sum(1)) ** -GAINS[kv]
        at = layer, KV.index(kv)
        read = (read @ axes.transpose(1, 2) * longer[:, None, None]).transpose(0, 1)
        return (read * self.stretch[at] + self.means[at]).to(vectors.dtype)


def water_filling(variance: Tensor, bits: float) -> Tensor:
    """What is lost along each axis [D] of a Gaussian of these variances [D] that is coded in `bits`."""
    low, high = 0.0, float(variance.max())
    for _ in range(BISECTIONS):
        level = (low + high) / 2
        if float((variance / level).clamp(min=1).log2().sum()) / 2 > bits:
            low = level
        else:
            high = level
    return variance.clamp(max=high)


@dataclass(frozen=True)
class Text:
    """A document, its exact keys and values, and bool [tokens]: what belongs to a password's sentence."""

    document: Document
    history: History
    needles: Tensor


@dataclass(frozen=True)
class Way:
    """How a text is read.

    codec: None reads it as it is. parts: that are coded. needles, others: whether the passwords' tokens are coded, and
    all others.
    """

    name: str
    codec: VectorCodec | None = None
    parts: tuple[str, ...] = KV
    needles: bool = True
    others: bool = True

    def read(self, text: Text, sinks: int, window: int) -> History:
        """The history as this way gives it back; the first and the newest tokens stay as they are."""
        if self.codec is None:
            return text.history
        coded = text.needles & self.needles | ~text.needles & self.others
        coded[:sinks] = False
        coded[len(coded) - window :] = False
        return [
            tuple(self._part(layer, *both, coded) for both in zip(KV, vectors, strict=True))  # type: ignore[misc]
            for layer, vectors in enumerate(text.history)
        ]

    def _part(self, layer: int, kv: str, vectors: Tensor, coded: Tensor) -> Tensor:
        if kv not in self.parts:
            return vectors
        assert self.codec is not None
        return vectors.index_put((coded,), self.codec(layer, kv, vectors[coded]))


def ways(dictionary: Dictionary, sparsities: list[int], others: list[Text], device: torch.device) -> Iterator[Way]:
    """All ways, in the order of the module. others: texts that the ideal codes know vectors from."""
    shape = dictionary.info.fingerprint
    vectors = [
        [torch.cat([text.history[layer][kv] for text in others]) for kv in range(2)]
        for layer in range(shape.num_layers)
    ]
    yield Way("exact")
    for S in sparsities:
        coder = partial(DictionaryCodec, dictionary, device, S, S)  # a new one each time: it counts what it loses
        yield Way(f"sparsity {S}", coder())
        for kv in KV:
            yield Way(f"sparsity {S}, {kv}s alone", coder(), (kv,))
        yield Way(f"sparsity {S}, all but needles", coder(), needles=False)
        yield Way(f"sparsity {S}, needles alone", coder(), others=False)
        bits = 8 * CodeLayout(shape.head_dim, shape.num_kv_heads, S, S).key_bytes
        yield Way(f"ideal, {bits} bits", IdealCodec(dictionary, vectors, bits, device))


def load_texts(reader: Reader, builder: Builder, length: int, count: int) -> list[Text]:
    """Documents with several passwords, computed."""
    texts = []
    for i in tqdm(range(count), desc="computing texts", unit="text", leave=False):
        document = builder.document(length, "multi", i)
        needles = torch.zeros(len(document.prompt), dtype=torch.bool, device=reader.device)
        for question in document.questions:
            tokens = builder.encode(NEEDLE.format(key=question.key, value=question.value))
            needles[find(document.prompt, tokens[:-1], question.key) :][: len(tokens)] = True
        texts.append(Text(document, reader.compute(document.prompt), needles))
    return texts


def find(ids: list[int], tokens: list[int], key: str) -> int:
    """Where `tokens` begin in `ids`; ValueError where they are not, `key` named."""
    for at in range(len(ids) - len(tokens) + 1):
        if ids[at : at + len(tokens)] == tokens:
            return at
    raise ValueError(f"the sentence of {key!r} is not in the text as the tokenizer splits it alone; take another model")


def ask(reader: Reader, encode: Callable[[str], list[int]], texts: list[Text], way: Way) -> dict[str, Any]:
    """Share of passwords found, mean loss of their first piece in nats, and their number."""
    found, losses = [], []
    for text in tqdm(texts, desc=way.name, unit="text", leave=False):
        history = way.read(text, reader.sinks, reader.window)
        for question in text.document.questions:
            value = encode(question.value)
            scores = reader.answer(question.prompt + value, len(value), history)
            wanted = torch.tensor(value, device=scores.device)
            found.append(bool((scores.argmax(-1) == wanted).all()))
            losses.append(-float(scores[0, wanted[0]]))
    return {"found": sum(found) / len(found), "first_loss": sum(losses) / len(losses), "questions": len(found)}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint: a folder, or a hub id")
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {DATA_FILES[0]}")
    parser.add_argument("--dictionary", type=Path, required=True, help="of the model")
    parser.add_argument("--sparsity", type=int, nargs="+", default=[7, 15], help="atoms a vector (default: 7 15)")
    parser.add_argument("--length", type=int, default=16384, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--texts", type=int, default=32, help="each has four passwords (default: %(default)s)")
    parser.add_argument("--window", type=int, default=96, help="newest tokens read as they are (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows (default: %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure every way and record it."""
    args = parse_args(arguments)
    reader, dictionary = Reader(args.model, args.device, args.window), load_dictionary(args.dictionary)
    tokenizer, documents = AutoTokenizer.from_pretrained(args.model), read_documents(args.data / DATA_FILES[0])
    builders = [Builder(documents, tokenizer, NeedleSettings(seed=seed)) for seed in (SEED, SEED + 1)]
    texts = load_texts(reader, builders[0], args.length, args.texts)
    others = load_texts(reader, builders[1], args.length, max(1, args.texts // 8))
    case = {"model": Path(args.model).name, "dictionary": args.dictionary.name}
    case |= {"length": args.length, "texts": args.texts, "window": args.window}
    exact: float | None = None
    for way in ways(dictionary, args.sparsity, others, reader.device):
        measured = ask(reader, builders[0].encode, texts, way)
        exact = measured["found"] if exact is None else exact
        lost = way.codec.energy_lost() if way.codec else dict.fromkeys(KV, 0.0)
        print(
            f"{way.name:28} found {measured['found']:.3f} of {measured['questions']}, first piece "
            f"{measured['first_loss']:.3f} nats, energy lost {lost['key']:.4f} of keys, {lost['value']:.4f} of values",
            flush=True,
        )
        kept = {name: value for name, value in lost.items() if value == value}  # nan where a part has not been coded
        at = case | {"way": way.name, "energy_lost": kept} | {k: v for k, v in measured.items() if k != "found"}
        record("needle_limits", at, "found", measured["found"], "exact", exact, folder=args.results)


if __name__ == "__main__":
    main()
