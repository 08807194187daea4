"""Which setting costs what: one study for each, as a row a point and as one picture with a panel a study.

    python benchmarks/quality_study.py Qwen/Qwen2.5-Coder-1.5B-Instruct --data DATA --dictionary FILE --out OUT \\
        --worst-layers 25 --more-dictionaries bundled=FILE books=FILE

Perplexity on WikiText-2, times that of the cache as it is (bf16 on a GPU), of a model that reads distant tokens as the
product's own coding gives them back; no engine. Studies:

  sparsity     atoms a vector
  window       newest tokens kept, against the bytes that a request of 1,024 tokens then holds, with blocks of 64 and
               128; 0 is measured with no token kept but the query's own, where the product keeps 32 at least
  sinks        first tokens kept, in the same way
  key_value    atoms moved from values to keys, at equal bytes
  gain         codes made longer than the pursuit leaves them, keys and values
  layers       some layers finer and the others coarser, at equal bytes
  dictionary   those of --more-dictionaries beside --dictionary
  error        a pursuit that stops at a relative error: loss against the bytes that its atoms need

OUT gets study.csv and study.png. Rows go to benchmarks/results/quality.jsonl, metric `perplexity_ratio`; a point that
has its row from the same commit and settings there is not measured again.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import torch
from bench.coded_model import CodedPerplexity, ratio
from bench.record import RESULTS, ROOT, find_commit, record
from bench.study_plots import draw
from bench.study_points import OWN, STUDIES, Coding, Setup
from bench.study_rows import METRIC, finished, point_case, write_csv
from bench.vector_codecs import ByLayer, CountingCodec, DictionaryCodec, VectorCodec
from lexico_kernels.memory.layout import KV
from torch import Tensor

from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.search import find_dictionary
from vllm_lexico.evals.tasks.windows import wikitext_windows

WIKITEXT = "wikitext2_raw_test.txt.xz"
NAMES = {torch.bfloat16: "bf16", torch.float32: "float32"}


def make_codec(coding: Coding, dictionary: Dictionary, device: str) -> VectorCodec:
    """The product's coding; layers that are coded alike share a codec."""
    pairs = dict.fromkeys(coding.sparsity)
    if coding.relative_error or len(pairs) == 1:
        kind = CountingCodec if coding.relative_error else DictionaryCodec
        key, value = coding.sparsity[0]
        return kind(dictionary, device, key, value, relative_error=coding.relative_error, gains=coding.gains)
    codecs = {pair: DictionaryCodec(dictionary, device, *pair, gains=coding.gains) for pair in pairs}
    return ByLayer([codecs[pair] for pair in coding.sparsity])


class Measure:
    """Measures codings, each once, beside the model as it is; loads when something is to be measured."""

    def __init__(self, args: argparse.Namespace, dictionaries: dict[str, Dictionary]) -> None:
        self.args, self.dictionaries = args, dictionaries
        self.known: dict[Coding, dict[str, Any]] = {}
        self.model: CodedPerplexity | None = None
        self.windows = self.base = torch.zeros(0)

    def __call__(self, coding: Coding) -> dict[str, Any]:
        """What a row says of a coding."""
        if coding not in self.known:
            model = self.model or self._load()
            model.read_raw(coding.sinks, max(coding.window, 1))
            codec = make_codec(coding, self.dictionaries[coding.dictionary], self.args.device)
            nll = model.negative_log_likelihood(self.windows, codec, self.args.batch)
            self.known[coding] = self._words(nll, codec, model.seconds)
        return self.known[coding]

    def _load(self) -> CodedPerplexity:
        from transformers import AutoTokenizer

        args = self.args
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        self.windows = wikitext_windows(args.data / WIKITEXT, tokenizer, args.length, args.windows)
        self.model = CodedPerplexity(args.model, args.device, skip=args.skip)
        self.base = self.model.negative_log_likelihood(self.windows, None, args.batch)
        print(f"{perplexity(self.base):.3f} is the perplexity of {NAMES[self.model.dtype]}", flush=True)
        return self.model

    def _words(self, nll: Tensor, codec: VectorCodec, seconds: float) -> dict[str, Any]:
        value, half = ratio(nll, self.base)
        raw = len(KV) * 2 * codec.means.shape[-1]  # bytes of K and V in 16 bits
        stored = 100 * sum(codec.vector_bytes.values()) / raw
        counting = codec if isinstance(codec, CountingCodec) else None
        return {
            "bytes_percent": round(stored, 4),
            "used_percent": round(100 * len(KV) * counting.mean_bytes() / raw, 4) if counting else round(stored, 4),
            "mean_atoms": round(counting.mean_atoms(), 4) if counting else None,
            "ratio": value,
            "ratio_95_percent": half if math.isfinite(half) else None,
            "perplexity": round(perplexity(nll), 5),
            "uncoded_perplexity": round(perplexity(self.base), 5),
            "energy_lost": {kv: round(share, 5) for kv, share in codec.energy_lost().items()},
            "seconds": round(seconds, 2),
        }


def perplexity(nll: Tensor) -> float:
    """Of windows of equal length."""
    return math.exp(float(nll.mean()))


def find_dictionaries(
    args: argparse.Namespace, shape: ModelFingerprint
) -> tuple[dict[str, Dictionary], dict[str, Any]]:
    """The dictionaries by name, and what rows say of each."""
    found = {OWN: find_dictionary(args.dictionary, args.model, shape)}
    for given in args.more_dictionaries:
        name, equals, file = given.partition("=")
        if not (name and equals and file) or name in found:
            raise ValueError(
                f"--more-dictionaries {given!r}; allowed: NAME=FILE, each name once and not {OWN!r}; "
                f"e.g. books=a.safetensors"
            )
        found[name] = find_dictionary(file, args.model, shape)
    loaded = {name: load_dictionary(path) for name, path in found.items()}
    for dictionary in loaded.values():
        dictionary.check(shape, args.model)
    facts = {
        name: {"file": found[name].name, "atoms": one.info.atoms, "atom_bits": one.info.atom_bits, "shared": one.shared}
        for name, one in loaded.items()
    }
    return loaded, facts


def check(args: argparse.Namespace) -> None:
    """ValueError for what cannot be measured, before anything is loaded."""
    unknown = [name for name in args.studies if name not in STUDIES]
    if unknown:
        raise ValueError(f"studies {unknown} are unknown; allowed: {', '.join(STUDIES)}; name some of these")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU here; allowed: cpu; or use PyTorch's CUDA build")
    if not (args.data / WIKITEXT).is_file():
        raise ValueError(f"--data {args.data} has no {WIKITEXT}; allowed: a folder with it; name that folder")


def run(args: argparse.Namespace) -> int:
    """Measure what is not yet measured, then write the table and the picture of all; 1 if a point failed."""
    from transformers import AutoConfig

    check(args)
    started = time.perf_counter()
    shape = ModelFingerprint.of(AutoConfig.from_pretrained(args.model).get_text_config())
    dictionaries, facts = find_dictionaries(args, shape)
    setup = Setup(shape.num_layers, tuple(args.worst_layers), tuple(dictionaries))
    points = [point for name in args.studies for point in STUDIES[name](setup)]
    largest = max(point.coding.window + point.coding.sinks for point in points)
    if args.length < largest + 2:
        raise ValueError(
            f"--length {args.length} is all read raw with sinks and window of {largest}; allowed: more than "
            f"{largest + 1}; 2048 is usual"
        )
    peer = "bf16" if args.device.startswith("cuda") else "float32"
    settings = {
        "model": Path(args.model).name, "dtype": peer, "text": "wikitext", "windows": args.windows,
        "length": args.length, "skip": args.skip,
    }  # fmt: skip
    all_wanted = [
        settings | {"dictionary_facts": facts[point.coding.dictionary]} | point_case(point, shape) for point in points
    ]
    kept, measure, cases, failed = finished(args.results, find_commit(ROOT)), Measure(args, dictionaries), [], []
    try:
        for point, wanted in zip(points, all_wanted, strict=True):
            case = next((case for case in kept if case | wanted == case), None)
            if case is None:
                try:
                    case = wanted | measure(point.coding)
                except RuntimeError as error:  # of the device: what is left may still fit
                    failed.append(point)
                    print(f"{point.study} {point.series} {point.name} failed: {error}", file=sys.stderr, flush=True)
                    continue
                record("quality", case, METRIC, case["ratio"], peer, 1.0, folder=args.results)
            cases.append(case)
            print(
                f"{point.study:10} {point.series:10} {point.name:22} {case['used_percent']:6.2f} %  "
                f"{case['ratio']:.4f} +- {case['ratio_95_percent'] or math.nan:.4f}  {case['seconds']:.1f} s",
                flush=True,
            )
    finally:
        if cases:
            args.out.mkdir(parents=True, exist_ok=True)
            write_csv(cases, args.out / "study.csv")
            draw(cases, args.out / "study.png", args.separate)
    print(f"{len(cases)} of {len(points)} points in {args.out}, {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return int(bool(failed))


def parse_args(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("model", help="a checkpoint's folder or hub id")
    add("--data", type=Path, required=True, metavar="DIR", help=f"folder of {WIKITEXT}")
    add("--dictionary", metavar="FILE", help="file or hub id (default: the one that serving would find)")
    add("--more-dictionaries", nargs="+", default=[], metavar="NAME=FILE", help="for the study `dictionary`")
    add("--out", type=Path, required=True, metavar="DIR", help="of table and picture")
    add("--studies", nargs="+", default=list(STUDIES), metavar="STUDY", help="(default: all, %(default)s)")
    add("--worst-layers", type=int, nargs="+", default=[], metavar="LAYER", help="from 0; kept finer in `layers`")
    add("--windows", type=int, default=24, help="of text (default: %(default)s)")
    add("--length", type=int, default=2048, help="tokens of a window of text (default: %(default)s)")
    add("--skip", type=int, default=256, help="first tokens without a score (default: %(default)s)")
    add("--batch", type=int, default=8 if gpu else 1, help="windows of text a pass (default here: %(default)s)")
    add("--separate", action="store_true", help="a picture for each study too, study_NAME.png")
    add("--device", default="cuda" if gpu else "cpu", help="(default here: %(default)s)")
    add("--results", type=Path, default=RESULTS, metavar="DIR", help="of rows (default: %(default)s)")
    return parser.parse_args(given)


if __name__ == "__main__":
    try:
        sys.exit(run(parse_args()))
    except (ValueError, OSError) as error:
        sys.exit(f"quality_study.py: {error}")
