"""What a coded KV cache does to a model's perplexity, beside the same model with the cache as it is.

    python benchmarks/perplexity.py MODEL --data DIR --caches lexico:15,lexico:15/11,paper:10,rotation:2

Every query reads the newest `window` tokens and the first `sinks` as they are and all others as a cache would give them
back, in one softmax: what serving does, without an engine. Runs in transformers, all caches in one process over the
same text; the interval of a ratio comes from the differences window by window.

Caches: lexico:S or lexico:K/V (the product's codes with S atoms a vector, or K for keys and V for values), paper:S (the
paper's format), rotation:B (a rotation and B bits a number). Rows go to benchmarks/results/dictionary.jsonl.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import torch
from bench.coded_model import CodedPerplexity, ratio
from bench.record import RESULTS, record
from bench.vector_codecs import DictionaryCodec, RotationCodec, VectorCodec, dictionary_means
from torch import Tensor

from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.search import find_dictionary
from vllm_lexico.evals.tasks.windows import jsonl_windows, wikitext_windows

TEXTS: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "wikitext": ("wikitext2_raw_test.txt.xz", wikitext_windows),
    "gsm8k": ("gsm8k_test.jsonl.xz", jsonl_windows),
}
CODECS = {"lexico": "packed16", "paper": "paper"}
DEFAULT_CACHES = "lexico:15,lexico:11,lexico:7,lexico:15/11,paper:10,rotation:2"
ROW = "{:14} {:>6} {:>7} {:>9} {:>8} {:>8} {:>7} {:>7} {:>7}"


def make_codec(
    name: str, dictionary: Dictionary, device: torch.device | str, gains: tuple[float, float] | None = None
) -> tuple[VectorCodec, dict[str, Any]]:
    """A cache by its name (see the module), and what its rows say of it; ValueError for other names."""
    kind, _, given = name.partition(":")
    try:
        numbers = [int(number) for number in given.split("/")]
    except ValueError:
        numbers = []
    if kind == "rotation" and len(numbers) == 1:
        means, head_dim = dictionary_means(dictionary, device), dictionary.info.fingerprint.head_dim
        return RotationCodec(head_dim, numbers[0], means), {"codec": kind, "bits": numbers[0], "sparsity": None}
    if kind not in CODECS or len(numbers) not in (1, 2):
        raise ValueError(
            f"cache {name!r} is unknown; allowed: lexico:S, lexico:K/V, paper:S, paper:K/V, rotation:B with whole "
            f"numbers; lexico:15 is the product's default"
        )
    key, value = numbers[0], numbers[-1]
    sparsity = key if key == value else {"key": key, "value": value}
    codec = DictionaryCodec(dictionary, device, key, value, CODECS[kind], gains=gains)
    return codec, {"codec": CODECS[kind], "sparsity": sparsity, "gains": list(codec.gains.values())}


def run(args: argparse.Namespace) -> None:
    """Measure the model as it is, then every cache; print and record each as it comes."""
    from transformers import AutoConfig, AutoTokenizer

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no GPU here; allowed: cpu; or use PyTorch's CUDA build")
    try:
        fingerprint = ModelFingerprint.of(AutoConfig.from_pretrained(args.model).get_text_config())
    except (OSError, ValueError) as error:
        raise ValueError(f"{args.model} is no model's folder nor a hub id that answers: {error}") from error
    path = find_dictionary(args.dictionary, args.model, fingerprint)
    dictionary = load_dictionary(path)
    dictionary.check(fingerprint, args.model)
    codecs = {name: make_codec(name, dictionary, args.device, args.gains) for name in args.caches.split(",")}
    file, read_windows = TEXTS[args.text]
    windows = read_windows(args.data / file, AutoTokenizer.from_pretrained(args.model), args.length, args.windows)
    some = None if len(fingerprint.layers) == fingerprint.num_layers else fingerprint.layers
    measure = CodedPerplexity(args.model, args.device, args.sinks, args.window, args.skip, some)
    dtype, info = str(measure.dtype).removeprefix("torch."), dictionary.info
    print(f"{Path(args.model).name}, {info.atoms} atoms of {info.atom_bits} bits ({path.name})")
    print(f"{len(windows)} windows of {args.length} tokens of {args.text}, sinks {args.sinks}, window {args.window}")
    print(ROW.format("cache", "bytes", "% bf16", "ppl", "ratio", "95 % +-", "K lost", "V lost", "s"))
    base = measure.negative_log_likelihood(windows, None, args.batch)
    perplexity, raw_bytes = math.exp(float(base.mean())), 2 * fingerprint.head_dim
    print(ROW.format(dtype, "", "", f"{perplexity:.3f}", "", "", "", "", f"{measure.seconds:.1f}"), flush=True)
    case = {
        "model": Path(args.model).name,
        "dtype": dtype,
        "uncoded_perplexity": round(perplexity, 5),
        "text": args.text,
        "windows": len(windows),
        "length": args.length,
        "skip": args.skip,
        "sinks": args.sinks,
        "window": args.window,
        "dictionary": path.name,
        "atoms": info.atoms,
        "atom_bits": info.atom_bits,
        "shared": dictionary.shared,
    }
    for name, (codec, words) in codecs.items():
        nll = measure.negative_log_likelihood(windows, codec, args.batch)
        value, half_width = ratio(nll, base)
        size = sum(codec.vector_bytes.values()) / 2
        lost, percent = codec.energy_lost(), 100 * size / raw_bytes
        shown = [f"{size:.1f}", f"{percent:.2f}", f"{math.exp(float(nll.mean())):.3f}", f"{value:.4f}"]
        shown += [f"{number:.4f}" for number in (half_width, *lost.values())]
        print(ROW.format(name, *shown, f"{measure.seconds:.1f}"), flush=True)
        measured = {
            "bytes_percent": round(percent, 4),
            "ratio_95_percent": half_width if math.isfinite(half_width) else None,
            "energy_lost": {kv: round(share, 5) for kv, share in lost.items() if math.isfinite(share)},
        }
        record("dictionary", case | words | measured, "perplexity_ratio", value, folder=args.out)
        for kv, share in lost.items():
            if math.isfinite(share):
                row = case | words | {"part": kv, "bytes": codec.vector_bytes[kv]}
                record("dictionary", row, "energy_lost", share, folder=args.out)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="a checkpoint's folder or hub id")
    parser.add_argument(
        "--data", type=Path, required=True, help=f"folder of {' and '.join(f for f, _ in TEXTS.values())}"
    )
    parser.add_argument("--dictionary", help="file or hub id (default: the one that serving would find)")
    parser.add_argument("--caches", default=DEFAULT_CACHES, help="parted by commas (default: %(default)s)")
    parser.add_argument("--text", choices=TEXTS, default="wikitext", help="(default: %(default)s)")
    parser.add_argument("--windows", type=int, help="text windows to read (default: all)")
    parser.add_argument("--length", type=int, default=2048, help="tokens a text window (default: %(default)s)")
    parser.add_argument("--skip", type=int, default=256, help="first tokens without a score (default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=16, help="first tokens kept as they are (default: %(default)s)")
    parser.add_argument("--window", type=int, default=128, help="newest tokens kept as they are (default: %(default)s)")
    parser.add_argument(
        "--gains", type=float, nargs=2, metavar=("KEY", "VALUE"),
        help="of codes over what the pursuit leaves (default: the product's); 0 0 for what a dictionary itself loses",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, default=1, help="text windows a pass (default: %(default)s; 8 for a GPU)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default here: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="of results (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        run(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"perplexity.py: {error}")
