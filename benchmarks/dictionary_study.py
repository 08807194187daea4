"""Which code is best, byte for byte: variants of dictionary and format, by the perplexity that they cost.

    python benchmarks/dictionary_study.py MODEL --data DIR [--variants base,heads,metric,...]

Captures one set of training vectors, trains every variant on it in the same short way, and measures WikiText-2 through
coded attention (`coded_model.py`) and the energy that each loses. Variants differ in what is trained (N atoms, a
dictionary for each head, a metric, halves of a head) or only in how coefficients are kept. Rows go to
benchmarks/results/dictionary.jsonl with metrics `perplexity_ratio` and `energy_lost` and case.study.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import torch
from bench.coded_model import CodedPerplexity, ratio
from bench.record import RESULTS, record
from bench.study_codecs import QUANTIZERS, Adapted, OnlySome, Spared, StudyCodec, Thresholded, both, fp8
from bench.vector_codecs import ByLayer, RotationCodec, VectorCodec
from lexico_kernels import KV
from torch import Tensor

from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.evals.tasks.windows import wikitext_windows
from vllm_lexico.train.capture import capture, load_model
from vllm_lexico.train.layer_learners import LayerLearners
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.levels import learn_levels
from vllm_lexico.train.texts import TextSequences

SOURCES = ("books", "textbooks", "docs", "math", "code")
SPARSITIES = (7, 11, 15)


@dataclass(frozen=True)
class Variant:
    """What is trained.

    powers: of the metric of keys and of values, 0 for none. by_head: a dictionary for each KV head. own_metric: a
    metric for each head even over one dictionary. diagonal: the metric's diagonal alone, which is a stretch.
    """

    atoms: int = 4096
    sparsity: int = 10
    atom_bits: int = 8
    powers: tuple[float, float] = (0.0, 0.0)
    by_head: bool = False
    own_metric: bool = False
    diagonal: bool = False
    halves: int = 1  # a vector is cut into so many, each coded on its own


VARIANTS = {
    "base": Variant(),
    "atoms1024": Variant(atoms=1024),
    "atoms2048": Variant(atoms=2048),
    "atoms8192": Variant(atoms=8192),
    "atoms2048x4": Variant(atoms=2048, atom_bits=4),
    "trained7": Variant(sparsity=7),
    "trained15": Variant(sparsity=15),
    "heads": Variant(by_head=True),
    "metric": Variant(powers=(1.0, 1.0)),
    "metric_half": Variant(powers=(0.5, 0.5)),
    "metric_head": Variant(powers=(1.0, 1.0), own_metric=True),
    "metric_head_half": Variant(powers=(0.5, 0.5), own_metric=True),
    "heads_metric_half": Variant(powers=(0.5, 0.5), by_head=True, own_metric=True),
    "heads_key_half": Variant(powers=(0.5, 0.0), by_head=True, own_metric=True),
    "heads_value_half": Variant(powers=(0.0, 0.5), by_head=True, own_metric=True),
    "heads_key_stretch_half": Variant(powers=(0.5, 0.0), by_head=True, own_metric=True, diagonal=True),
    "heads_key_stretch": Variant(powers=(1.0, 0.0), by_head=True, own_metric=True, diagonal=True),
    "heads_stretch_half": Variant(powers=(0.5, 0.5), by_head=True, own_metric=True, diagonal=True),
    "halves": Variant(halves=2, sparsity=5),
}


class Trained:
    """One variant's dictionaries of all layers, and the way into and out of its coordinates."""

    def __init__(self, variant: Variant, store: Tensor, metrics: Tensor, seed: int, passes: int) -> None:
        layers, _, _, heads, dim = store.shape
        self.variant, self.heads, self.dim = variant, heads, dim
        self.means = torch.stack([vectors.float().mean(0) for vectors in store.flatten(0, 1)]).view(
            layers, 2, heads, dim
        )
        self.maps = self.inverses = None
        if any(variant.powers):
            metric = metrics if variant.own_metric else metrics.mean(2, keepdim=True).expand_as(metrics)
            if variant.diagonal:
                metric = metric.diagonal(dim1=-2, dim2=-1).diag_embed()
            roots = [root_of(metric[:, at], power) for at, power in enumerate(variant.powers)]
            self.maps, self.inverses = (torch.stack(maps, 1) for maps in zip(*roots, strict=True))
        self.copies = (heads if variant.by_head else 1) * variant.halves
        rows = self._coordinates(store)
        settings = LearnSettings(
            atoms=variant.atoms, sparsity=variant.sparsity, atom_bits=variant.atom_bits, shared=True
        )
        learners = LayerLearners(list(range(len(rows))), settings, seed, str(store.device))
        learners.learn(rows, passes, 0, cooling=(0.0, 1.0))
        atoms, levels = [], []
        for learner, kv in learners._groups():
            atoms.append(learners._stored_atoms(learner))
            sample = learners._vectors(rows, kv, learners._sample(rows))
            levels.append(learn_levels(sample, atoms[-1], (3, 5, 7, 9, 11, 13, 15, 19, 23)))
        self.atoms = torch.cat(atoms).unflatten(0, (-1, 2))
        table = torch.cat([kv.table for kv in levels]).unflatten(0, (layers, self.copies, 2))
        self.levels = table.transpose(1, 2)  # [layers, 2, copies, 32, 16]

    def _coordinates(self, store: Tensor) -> Tensor:
        """[layers * copies, 2, tokens, heads that share, D'] in the model's dtype: what is learned from."""
        layers, _, tokens, heads, _ = store.shape
        sharing, width = heads * self.variant.halves // self.copies, self.dim // self.variant.halves
        size = (layers * self.copies, 2, tokens, sharing, width)
        made = torch.empty(size, dtype=store.dtype, device=store.device)
        for layer in range(layers):
            for kv in range(2):
                vectors = self.to_code(store[layer, kv].float() - self.means[layer, kv], layer, kv)
                grouped = vectors.unflatten(0, (self.copies, -1)).transpose(1, 2)
                made[layer * self.copies : (layer + 1) * self.copies, kv] = grouped.to(store.dtype)
        return made

    def halves(self, vectors: Tensor) -> Tensor:
        """[..., Hk, D] -> [..., halves, Hk, D / halves]; of a key, a half has whole rotary pairs."""
        count = self.variant.halves
        pairs = vectors.unflatten(-1, (2, count, self.dim // 2 // count))  # dim i turns with dim i + D / 2
        return pairs.transpose(-3, -2).flatten(-2).transpose(-3, -2)

    def to_code(self, centred: Tensor, layer: int, kv: int) -> Tensor:
        """float32 [tokens, Hk, D] -> [copies and heads that share, tokens, D']."""
        if self.maps is not None:
            centred = torch.einsum("thd,hed->the", centred, self.maps[layer, kv])
        if self.variant.halves > 1:
            return self.halves(centred).flatten(1, 2).transpose(0, 1)
        return centred.transpose(0, 1)

    def from_code(self, vectors: Tensor, layer: int, kv: int) -> Tensor:
        """Inverse of `to_code`."""
        back = vectors.transpose(0, 1)
        if self.variant.halves > 1:
            count = self.variant.halves
            pairs = back.unflatten(1, (count, self.heads)).transpose(1, 2).unflatten(-1, (2, -1))
            back = pairs.transpose(-3, -2).flatten(-3)
        if self.inverses is not None:
            back = torch.einsum("thd,hed->the", back, self.inverses[layer, kv])
        return back


def root_of(metric: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """metric ** (power / 2) of unit mean eigenvalue, and its inverse: [..., D, D]."""
    values, vectors = torch.linalg.eigh(metric.double())
    values = values / values.mean(-1, keepdim=True)
    values = (values + 1e-3).pow(power / 2)
    forward = (vectors * values[..., None, :]) @ vectors.mT
    backward = (vectors / values[..., None, :]) @ vectors.mT
    return forward.float(), backward.float()


class QueryMoments:
    """Codec that leaves vectors as they are; `metrics` says how much an error in each direction does."""

    def __init__(self, measure: CodedPerplexity, windows: Tensor) -> None:
        config = measure.model.config
        shape = ModelFingerprint.of(config)
        heads, dim, device = shape.num_kv_heads, shape.head_dim, measure.device
        self.metrics = torch.zeros(shape.num_layers, 2, heads, dim, dim, device=device)
        attend = measure.attend

        def watching(layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
            some = query[:, :, ::4].float().unflatten(1, (heads, -1))
            self.metrics[layer, 0] += torch.einsum("bhgtd,bhgte->hde", some, some)
            return attend(layer, query, key, value, scale)

        measure.attend = watching  # type: ignore[method-assign]
        measure.negative_log_likelihood(windows, None, 4)
        measure.attend = attend  # type: ignore[method-assign]
        for layer, block in enumerate(measure.model.base_model.layers):
            weight = block.self_attn.o_proj.weight.detach().float().unflatten(1, (heads, -1, dim))
            self.metrics[layer, 1] = torch.einsum("ohgd,ohge->hde", weight, weight)


class Study:
    """A captured store, a model that measures, and rows as they come."""

    def __init__(self, args: argparse.Namespace) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.model)
        sources = [str(args.data / f"train_{name}.jsonl.xz") for name in SOURCES]
        texts = TextSequences(sources, tokenizer, args.sequence_tokens, 0)
        loaded = load_model(args.model, args.device, "auto" if args.device == "cuda" else "float32")
        shape = ModelFingerprint.of(loaded.config)
        kept = args.sequence_tokens - 16
        count = -(-args.vectors // shape.num_kv_heads // kept)
        layers, pair = range(shape.num_layers), (shape.num_kv_heads, shape.head_dim)
        self.store = capture(loaded, texts.take(count, 0), kept, layers, pair, 0, 8 if args.device == "cuda" else 1)
        query_text, self.tuning = texts.take(4, 1), texts.take(8, None)  # the latter of no round, to choose by
        del loaded
        self.measure = CodedPerplexity(args.model, args.device, skip=args.skip)
        self.windows = wikitext_windows(args.data / "wikitext2_raw_test.txt.xz", tokenizer, args.length, args.windows)
        self.base = self.measure.negative_log_likelihood(self.windows, None, args.batch)
        self.metrics = QueryMoments(self.measure, query_text).metrics
        self.args, self.shape, self.layers = args, shape, layers

    def train(self, name: str) -> Trained:
        started = time.perf_counter()
        trained = Trained(VARIANTS[name], self.store, self.metrics, 0, self.args.passes)
        print(f"-- {name}: trained in {time.perf_counter() - started:.1f} s", flush=True)
        return trained

    def score(self, name: str, codec: VectorCodec, windows: int | None = None, **words: Any) -> float:
        """Measure one codec and keep the row."""
        nll = self.measure.negative_log_likelihood(self.windows[:windows], codec, self.args.batch)
        value, half = ratio(nll, self.base[:windows])
        size = sum(codec.vector_bytes.values()) / 2
        lost = codec.energy_lost()
        print(
            f"{name:34s} {size:5.1f} bytes  ratio {value:.4f} +- {half:.4f}  lost K {lost['key']:.4f} "
            f"V {lost['value']:.4f}  {self.measure.seconds:.1f} s",
            flush=True,
        )
        case = {
            "study": name, "model": Path(self.args.model).name, "windows": len(nll), "bytes": size,
            "bytes_percent": round(100 * size / 2 / self.shape.head_dim, 3),
            "ratio_95_percent": half if math.isfinite(half) else None,
            "training_vectors": self.store.shape[2] * self.store.shape[3], "passes": self.args.passes,
            "energy_lost": {kv: round(share, 5) for kv, share in lost.items() if math.isfinite(share)},
        }  # fmt: skip
        record("dictionary", case | words, "perplexity_ratio", value, folder=self.args.out)
        return value


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """All variants, and after the base what can be asked of it without training again."""
    study = Study(args)
    for name in args.variants.split(","):
        trained = study.train(name)
        for sparsity in (15, 7) if name != "base" else (*SPARSITIES, 3, 23):
            study.score(f"{name} s={sparsity}", StudyCodec(trained, both(sparsity)), sparsity=sparsity)
        if name == "base":
            extras(study, trained)


def extras(study: Study, base: Trained) -> None:
    """Formats of the coefficients, unequal K and V, scalar peers, and which layers do the damage."""
    for name, quantizer in QUANTIZERS.items():
        for sparsity in (15, 7):
            study.score(f"base {name} s={sparsity}", StudyCodec(base, both(sparsity), quantizer), sparsity=sparsity)
    paper = StudyCodec(base, both(10), fp8)
    paper.vector_bytes = both(32)
    study.score("paper's format s=10", paper, sparsity=10)
    for key, value in ((11, 19), (13, 17), (17, 13), (19, 11), (5, 9), (9, 5)):
        codec = StudyCodec(base, {"key": key, "value": value})
        study.score(f"base K {key} V {value}", codec, sparsity={"key": key, "value": value})
    for bits in (1, 2, 3, 4):
        study.score(f"rotation {bits} bits", RotationCodec(study.shape.head_dim, bits, base.means), bits=bits)
    for error in (0.2, 0.3, 0.4):
        study.score(f"base s<=31, error <= {error}", Thresholded(base, error), error=error)
    for fresh in (64, 256):
        for sparsity in (15, 7):
            adapted = Adapted(base, both(sparsity), fresh)
            study.score(f"base with {fresh} atoms of the text itself s={sparsity}", adapted, sparsity=sparsity)
    damage(study, base)
    for total in (14, 30):
        split = best_splits(study, base, total)
        codecs = [StudyCodec(base, dict(zip(KV, pair, strict=True))) for pair in split]
        study.score(f"base K and V split by layer, {total} atoms", ByLayer(codecs), split=split)


def damage(study: Study, base: Trained) -> None:
    """Which layers, parts, heads and tokens cost most at S = 7: each alone, or all but the worst coded."""
    code, windows = StudyCodec(base, both(7)), 8
    for layer in study.layers:
        for kv in KV:
            only = OnlySome(code, layer, (kv,))
            study.score(f"base s=7, {kv} of layer {layer} alone", only, windows, layer=layer, kv=kv)
    for head in range(study.shape.num_kv_heads):
        only = OnlySome(code, None, KV, head)
        study.score(f"base s=7, head {head} of all layers alone", only, windows, head=head)
    for share in (0.01, 0.05):
        study.score(f"base s=7, worst {share:.0%} of tokens exact", Spared(code, share), spared=share)


def best_splits(study: Study, base: Trained, total: int) -> list[tuple[int, int]]:
    """Atoms of K and V of each layer, `total` together, that cost least on text that is not scored."""
    exact = study.measure.negative_log_likelihood(study.tuning, None, study.args.batch)
    half, chosen = total // 2, []
    for layer in study.layers:
        losses = {}
        for key in (half - 2, half, half + 2):
            codec = StudyCodec(base, {"key": key, "value": total - key})
            nll = study.measure.negative_log_likelihood(study.tuning, OnlySome(codec, layer), study.args.batch)
            losses[key, total - key] = float((nll - exact).mean())
        chosen.append(min(losses, key=losses.__getitem__))
    return chosen


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint's folder or hub id")
    parser.add_argument("--data", type=Path, required=True, help="folder of the training texts and WikiText-2")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="parted by commas (default: %(default)s)")
    parser.add_argument("--vectors", type=int, default=700_000, help="a layer and part (default: %(default)s)")
    parser.add_argument("--passes", type=int, default=4, help="over the vectors (default: %(default)s)")
    parser.add_argument("--sequence-tokens", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--windows", type=int, default=24, help="of WikiText-2 (default: %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=256, help="first tokens without a score (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="windows a pass (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    run(parse_args())
