"""What a dictionary is trained on, and what it then loses on text of other kinds.

    python benchmarks/dictionary_texts.py MODEL --data DIR
    python benchmarks/dictionary_texts.py MODEL --data DIR --trained-on "all;own;written;written: bare;written: code"

Trains the same short way on all kinds of text, on books alone, on text that the model writes itself, and without
reading far positions. "written" is what vLLM has the model write from the prompts of `train/prompts.py`, as
`vllm-lexico train` does without --data; "written: KIND, KIND" are its texts of those kinds alone, and "written: no
KIND" those of all others. "package 0.6" reads text of the package in 6 rows of 10 and "written" in the others. With
--files nothing is trained: dictionary files are measured, and compared with the first.

    python benchmarks/dictionary_texts.py MODEL --data DIR --files real.safetensors own.safetensors

Measures the energy lost on held-out texts of every kind, on WikiText-2, and on keys as they stand far into a context.
Of code the files of Python's library are left out there: `vllm-lexico train` without --data reads those that it finds.
Rows go to benchmarks/results/dictionary.jsonl, metric `energy_lost`, case.trained_on.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import torch
from bench.file_losses import loss_rows
from bench.held_out import held_out_texts
from bench.record import RESULTS, record
from lexico_kernels import KV
from torch import Tensor

from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.train.capture import capture, load_model
from vllm_lexico.train.layer_learners import LayerLearners
from vllm_lexico.train.learn import LearnSettings, evaluate
from vllm_lexico.train.levels import learn_levels
from vllm_lexico.train.own_text import join, sequences_from_model
from vllm_lexico.train.package_text import mixed, package_sequences
from vllm_lexico.train.progress import Progress, Stage
from vllm_lexico.train.prompts import SHARES
from vllm_lexico.train.texts import TextSequences
from vllm_lexico.train.vllm_writer import WriterJob
from vllm_lexico.train.writing import write

KINDS = ("books", "textbooks", "docs", "math", "code")
TESTED = ("books", "math", "code", "wikitext", "chat")
CHAT_FILE = "gsm8k_test.jsonl.xz"  # questions and answers, through the model's chat template
LIBRARY = "Python 3.11 standard library"  # a source of the code
SPARSITIES = (7, 15)
FAR = 16384


class Texts:
    """A model that reads; vectors [layers, 2, tokens, Hk, D] by kind of text."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        self.args, self.loaded = (
            args,
            load_model(args.model, args.device, "auto" if args.device == "cuda" else "float32"),
        )
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.shape = ModelFingerprint.of(self.loaded.config)
        self.folder = Path(tempfile.mkdtemp())
        self._written: dict[str, Tensor] | None = None

    def source(self, kind: str) -> str:
        if kind == "chat":
            return str(self._chats())
        if kind != "wikitext":
            return str(self.args.data / f"train_{kind}.jsonl.xz")
        plain = self.folder / "wikitext.txt"
        with lzma.open(self.args.data / "wikitext2_raw_test.txt.xz", "rt") as text:
            plain.write_text(text.read())
        return str(plain)

    def _chats(self) -> Path:
        """A file of conversations; plain text where the model has no chat template."""
        chats, path = [], self.folder / "chat.jsonl"
        with lzma.open(self.args.data / CHAT_FILE, "rt") as file:
            rows = [json.loads(line) for line in file]
        for row in rows:
            turns = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
            if self.tokenizer.chat_template:
                chats.append(self.tokenizer.apply_chat_template(turns, tokenize=False))
            else:
                chats.append(f"{row['question']}\n{row['answer']}")
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in chats))
        return path

    def written(self, name: str, count: int) -> Tensor:
        """What vLLM has the model write, or some kinds of it: int64 [count, tokens]; too little is repeated."""
        if self._written is None:
            job = WriterJob(
                self.args.model, "", self.args.written_texts * count * self.args.sequence_tokens,
                self.args.sequence_tokens, self.args.device, "auto", 0, "",
            )  # fmt: skip
            progress = Progress([Stage("write", "vLLM writes", job.tokens, 1e-4)])
            self._written, made = write(job, self.args.device, progress)
            progress.close()
            print(f"written: {json.dumps(made)}", flush=True)
        kinds, chosen = list(SHARES), name.partition(":")[2]
        wanted = set(kinds)
        if chosen.strip():
            named = {kind.strip() for kind in chosen.replace(" no ", " ").split(",")}
            wanted = wanted - named if chosen.startswith(" no ") else named
        texts = self._written["ids"].split(self._written["lengths"].tolist())
        own = [text for text, kind in zip(texts, self._written["kinds"].tolist(), strict=True) if kinds[kind] in wanted]
        rows = join(torch.cat(own), self.args.sequence_tokens)
        return rows[torch.arange(count) % len(rows)]

    def beside_package(self, share: float, count: int) -> Tensor:
        """Text of the package in a share of the rows, what vLLM has the model write in the others."""
        package = int(count * share)
        text = package_sequences(self.tokenizer, self.args.sequence_tokens, 0).take(package, 0)
        return mixed(self.written("written", count)[: count - package], text, 0)

    def vectors(self, sequences: Tensor, furthest: int = 0) -> Tensor:
        layers, pair = range(self.shape.num_layers), (self.shape.num_kv_heads, self.shape.head_dim)
        kept = sequences.shape[1] - 16
        batch = 8 if self.args.device == "cuda" else 1
        return capture(self.loaded, sequences, kept, layers, pair, 0, batch, furthest=furthest)

    def read(self, kinds: tuple[str, ...], count: int, number: int | None, furthest: int = 0) -> Tensor:
        texts = TextSequences([self.source(kind) for kind in kinds], self.tokenizer, self.args.sequence_tokens, 0)
        return self.vectors(texts.take(count, number), furthest)

    def held_out(self, kind: str, count: int) -> Tensor:
        """Of texts that nothing was trained on."""
        if kind != "code":
            return self.read((kind,), count, None)
        held = {kind: held_out_texts(Path(self.source(kind)), without=LIBRARY)}
        texts = TextSequences((), self.tokenizer, self.args.sequence_tokens, 0, documents=held)
        return self.vectors(texts.take(count, 0))


def held_out(texts: Texts, few: int) -> tuple[dict[str, Tensor], int]:
    """Vectors of `few` texts of every kind that nothing was trained on, and how far the model's context goes."""
    tests = {kind: texts.held_out(kind, few) for kind in TESTED}
    far = texts.loaded.config.max_position_embeddings
    if far > FAR:  # the second pair of sequences stands far into a context, see `capture`
        wide = texts.read(("books",), 4 * few, None, furthest=2 * FAR)
        tests["books, far"] = wide.unflatten(2, (4 * few, -1))[:, :, 2::4].flatten(2, 3).contiguous()
    return tests, far


def measure_files(args: argparse.Namespace) -> None:
    """What dictionary files lose on texts of all kinds, beside the first of them."""
    files = {path.name: load_dictionary(path) for path in args.files}
    texts = Texts(args)
    count = -(-args.vectors // texts.shape.num_kv_heads // (args.sequence_tokens - 16))
    tests, _ = held_out(texts, max(1, count // 16))
    first = args.files[0].name
    rows = loss_rows(files, tests, SPARSITIES)
    for row in rows:
        info = files[row["file"]].info
        case = {
            "study": "texts", "model": Path(args.model).name, "trained_on": info.data,
            "text": row["text"], "part": row["part"], "sparsity": row["sparsity"], "bytes": 2 * (row["sparsity"] + 1),
            "atoms": info.atoms, "training_vectors": info.vectors_seen, "peer_trained_on": files[first].info.data,
        }  # fmt: skip
        peer = (first, row["lost"] / row["ratio"]) if row["file"] != first else (None, None)
        record("dictionary", case, "energy_lost", row["lost"], *peer, folder=args.out)
        print(
            f"{row['file']:32s} on {row['text']:12s} {row['part']:5s} s={row['sparsity']:2d} {row['lost']:.4f}  "
            f"{row['ratio']:.3f} of {first}'s",
            flush=True,
        )


def run(args: argparse.Namespace) -> None:
    """Train on each kind in turn; test each dictionary on all."""
    texts = Texts(args)
    count = -(-args.vectors // texts.shape.num_kv_heads // (args.sequence_tokens - 16))
    tests, far = held_out(texts, max(1, count // 16))
    stores: dict[str, Any] = {
        "all, near": lambda: texts.read(KINDS, count, 0),
        "all": lambda: texts.read(KINDS, count, 0, furthest=2 * FAR if far > FAR else 0),
        "books": lambda: texts.read(("books",), count, 0, furthest=2 * FAR if far > FAR else 0),
        "own": lambda: texts.vectors(
            sequences_from_model(
                texts.loaded, args.own_tokens, count * args.sequence_tokens // args.own_tokens, 0, 512
            ),
            2 * FAR if far > FAR else 0,
        ),
    }
    for name in args.trained_on.split(";"):
        started = time.perf_counter()
        if name.startswith("written"):
            store = texts.vectors(texts.written(name, count), 2 * FAR if far > FAR else 0)
        elif name.startswith("package"):
            share = float(name.removeprefix("package"))
            store = texts.vectors(texts.beside_package(share, count), 2 * FAR if far > FAR else 0)
        else:
            store = stores[name]()
        read = time.perf_counter() - started
        settings = LearnSettings(atoms=args.atoms, shared=True)
        learners = LayerLearners(list(range(texts.shape.num_layers)), settings, 0, str(store.device))
        learners.learn(store, args.passes, 0, cooling=(0.0, 1.0))
        print(f"{name}: read in {read:.1f} s, learned in {time.perf_counter() - started - read:.1f} s", flush=True)
        for kind, test in tests.items():
            lost = losses(learners, store, test)
            print(f"  on {kind:12s} " + "  ".join(f"{kv} s={s} {lost[s][kv]:.4f}" for s in SPARSITIES for kv in KV))
            for sparsity in SPARSITIES:
                for kv in KV:
                    case = {
                        "study": "texts", "model": Path(args.model).name, "trained_on": name, "text": kind,
                        "part": kv, "sparsity": sparsity, "bytes": 2 * (sparsity + 1), "atoms": args.atoms,
                        "training_vectors": store.shape[2] * store.shape[3], "passes": args.passes,
                    }  # fmt: skip
                    record("dictionary", case, "energy_lost", lost[sparsity][kv], folder=args.out)


def losses(learners: LayerLearners, store: Tensor, test: Tensor) -> dict[int, dict[str, float]]:
    """Energy lost, mean of the layers, by sparsity and part."""
    found: dict[int, list[Tensor]] = {sparsity: [] for sparsity in SPARSITIES}
    for learner, kv in learners._groups():
        atoms = learners._stored_atoms(learner)
        levels = learn_levels(learners._vectors(store, kv, learners._sample(store)), atoms, SPARSITIES)
        rows = torch.arange(test.shape[2] * test.shape[3], device=test.device)
        for sparsity, values in evaluate(learners._vectors(test, kv, rows), atoms, levels, SPARSITIES).items():
            found[sparsity].append(values)
    means = {sparsity: torch.cat(values).view(-1, 2).mean(0).tolist() for sparsity, values in found.items()}
    return {sparsity: dict(zip(KV, values, strict=True)) for sparsity, values in means.items()}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder or hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder of the texts")
    parser.add_argument("--trained-on", default="all, near;all;books;own", help="parted by ; (default: %(default)s)")
    parser.add_argument(
        "--files", type=Path, nargs="+", metavar="FILE", help="dictionary files to measure, the first the peer"
    )
    parser.add_argument("--atoms", type=int, default=4096, help="(default: %(default)s)")
    parser.add_argument("--vectors", type=int, default=700_000, help="a layer and part (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=4, help="over the vectors (default: %(default)s)")
    parser.add_argument("--sequence-tokens", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--own-tokens", type=int, default=1024, help="of a self-written text (default: %(default)s)")
    parser.add_argument(
        "--written-texts",
        type=int,
        default=1,
        help="how many times as much as is trained on vLLM writes, so that one kind has enough (default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    given = parse_args()
    (measure_files if given.files else run)(given)
