"""How good and how fast the pursuit is, on vectors captured from a model and its trained dictionary.

    python benchmarks/omp.py --model DIR --data DIR --dictionary FILE --save VECTORS   # capture, then measure
    python benchmarks/omp.py --vectors VECTORS --authors DIR --omp-gpu DIR             # needs no model
    python benchmarks/omp.py --planted 256 --sparsities 31 15 --count 65536            # head sizes without a dictionary
    python benchmarks/omp.py --vectors VECTORS --ways        # only: every way to code them, side by side

Through `omp_encode` into real pages, and `pursue`. Quality comes first and a run that fails it stops: residual energy
over that of OMP in float64 with as many atoms, ours quantized and not against theirs quantized and not. Then rates
beside cuBLAS, ratios to the authors' `omp_v0` and to the package orthogonal-matching-pursuit-gpu, and the latency of
one launch. Rows go to benchmarks/results/omp.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import torch
from bench.omp_latency import record_latencies
from bench.omp_peers import Authors, OmpGpu, float64_energies
from bench.omp_vectors import CapturedLayer, capture_vectors, load_vectors, planted_layer
from bench.omp_ways import Encode, e4m3_tflops, ways_for
from bench.record import RESULTS, record
from lexico_kernels import KV
from lexico_kernels.memory.pages import LayerCache
from lexico_kernels.ops import omp_encode, pursue
from lexico_kernels.testing import residual_energy
from lexico_kernels.timing import milliseconds
from torch import Tensor

SOURCES = ("books", "textbooks", "docs", "math", "code")
MATMUL = 8192
MOST_ENERGY = 1.05  # over float64's; more is a fault, not a measurement
DECODED_TOKENS = 8192  # at once, to bound memory


def matmul_tflops() -> float:
    """TFLOP/s of cuBLAS, 8,192 cubed in bf16."""
    a, b = torch.randn(2, MATMUL, MATMUL, device="cuda", dtype=torch.bfloat16)
    return 2 * MATMUL**3 / milliseconds(lambda: a @ b) / 1e9


def encoding(layer: CapturedLayer, sparsity: int, encode: Encode = omp_encode) -> tuple[LayerCache, Callable[[], None]]:
    """Pages, and a call that codes all of the layer's vectors into them."""
    cache, tokens = layer.cache(sparsity), layer.vectors.shape[1]
    source = torch.arange(tokens, device="cuda", dtype=torch.int32)
    destination = source.long() + cache.layout.block_tokens
    key, value = layer.vectors
    return cache, lambda: encode(key, value, cache, source, destination)


def stored_energy(layer: CapturedLayer, cache: LayerCache, kv: str) -> float:
    """Residual energy of a part's records in the pages, stretch taken off."""
    vectors, lost = layer.vectors[KV.index(kv)], 0.0
    for tokens in torch.arange(len(vectors), device=vectors.device).split(DECODED_TOKENS):
        slots = tokens + cache.layout.block_tokens
        lost += float(residual_energy(cache, slots, vectors[tokens], kv).sum())
    return lost


def groups(layer: CapturedLayer) -> tuple[Tensor, Tensor]:
    """Centred and stretched vectors [2 Hk, T, D] float32 and atoms [2 Hk, N, D], keys' heads first."""
    vectors: list[Tensor] = []
    atoms: list[Tensor] = []
    for own, kv in zip(layer.vectors, KV, strict=True):
        vectors += ((own.float() - layer.means[kv]) / layer.stretches[kv]).unbind(1)
        atoms += layer.atoms[kv].expand(own.shape[1], -1, -1).unbind(0)
    return torch.stack(vectors), torch.stack(atoms)


def float64_lost(layer: CapturedLayer, kv: str, sparsity: int) -> tuple[float, float, float]:
    """Residual energy of OMP in float64 over keys or values, as it is and quantized as ours, and the vectors' own."""
    at, levels = KV.index(kv), layer.levels[kv][sparsity]
    # As the pages' vectors are: what the model's precision keeps of them, less the mean in float64.
    centred = (layer.vectors[at].double() - layer.means[kv].double()) / layer.stretches[kv].double()
    books = layer.atoms[kv].expand(centred.shape[1], -1, -1)
    pairs = [float64_energies(centred[:, row], book, sparsity, levels) for row, book in enumerate(books)]
    exact, quantized = (sum(energies) for energies in zip(*pairs, strict=True))
    return exact, quantized, float(centred.square().sum())


def measure_quality(layer: CapturedLayer, sparsity: int, case: dict[str, Any], out: Path) -> None:
    """Energy ratios of each part, printed and recorded; AssertionError if one is far off."""
    cache, encode = encoding(layer, sparsity)
    encode()
    vectors, atoms = groups(layer)
    _, _, residual = pursue(vectors, atoms, sparsity)
    heads = layer.vectors.shape[2]
    for at, kv in enumerate(KV):
        rows = range(at * heads, (at + 1) * heads)
        exact, quantized, energy = float64_lost(layer, kv, sparsity)
        own = {
            "quantized": stored_energy(layer, cache, kv),
            "unquantized": float(residual[rows[0] : rows[-1] + 1].double().square().sum()),
        }
        compared = (("quantized", "quantized"), ("quantized", "unquantized"), ("unquantized", "unquantized"))
        for ours, theirs in compared:
            value, peer = own[ours] / energy, (quantized if theirs == "quantized" else exact) / energy
            words = {"part": kv, "ours": ours, "float64": theirs}
            row = record("omp", case | words, "residual_energy", value, "OMP in float64", peer, folder=out)
            print(f"S {sparsity} {kv}: {ours} over float64 {theirs} {row['ratio']:.5f}, energy lost {value:.4f}")
            # Quantizing costs a few percent; like with like must agree.
            assert ours != theirs or row["ratio"] < MOST_ENERGY, "the pursuit is not right"


def measure_rates(layer: CapturedLayer, sparsity: int, case: dict[str, Any], out: Path) -> float:
    """Vectors a second of both operations, recorded with cuBLAS's rate; returns that of omp_encode."""
    matmul = matmul_tflops()
    record("omp", case | {"size": MATMUL}, "matmul_tflops", matmul, folder=out)
    _, encode = encoding(layer, sparsity)
    vectors, atoms = groups(layer)
    count, flops = vectors.shape[0] * vectors.shape[1], 2 * atoms.shape[1] * atoms.shape[2] * sparsity
    rates = {}
    for name, call in (("omp_encode", encode), ("pursue", lambda: pursue(vectors, atoms, sparsity))):
        rates[name] = count / milliseconds(call) * 1e3
        words = case | {"operation": name}
        record("omp", words, "vectors_per_second", rates[name], folder=out)
        row = record("omp", words, "correlation_tflops", rates[name] * flops / 1e12, "cuBLAS bf16", matmul, folder=out)
        print(f"S {sparsity} {name}: {rates[name] / 1e6:.2f} M vectors/s, {row['value']:.0f} TFLOP/s of correlations, "
              f"{row['ratio']:.1%} of cuBLAS's {matmul:.0f}")  # fmt: skip
    return rates["omp_encode"]


def measure_ways(layer: CapturedLayer, sparsity: int, case: dict[str, Any], out: Path) -> None:
    """Energy and rate of every way to code, beside Triton's; one that loses too much is not timed."""
    rows, flops = case["vectors"], 2 * case["atoms"] * case["head_dim"] * sparsity
    peaks = {}
    for shape in ((MATMUL, MATMUL, MATMUL), (rows, case["atoms"], case["head_dim"])):
        peaks[shape] = e4m3_tflops(*shape)
        record("omp", case | {"shape": shape}, "e4m3_matmul_tflops", peaks[shape], folder=out)
        print(f"{shape}: {peaks[shape]:.0f} TFLOP/s of e4m3 products")
    peak = max(peaks.values())
    theirs = {kv: float64_lost(layer, kv, sparsity)[1] for kv in KV}
    triton = None
    for way in ways_for(layer.cache(sparsity)):
        cache, encode = encoding(layer, sparsity, way.encode)
        try:
            encode()
        except Exception as error:  # a launch that does not fit the device is an answer too
            print(f"S {sparsity} {way.name}: {type(error).__name__} {error}", file=sys.stderr)
            continue
        ratios = {f"energy_{kv}": stored_energy(layer, cache, kv) / theirs[kv] for kv in KV}
        words = case | {"operation": "omp_encode", "way": way.name} | ratios
        told = ", ".join(f"{ratio:.4f}" for ratio in ratios.values())
        if not max(ratios.values()) < MOST_ENERGY:
            print(f"S {sparsity} {way.name}: energy {told} of float64's, NOT RIGHT")
            continue
        rate = rows / milliseconds(encode) * 1e3
        triton = triton or rate
        record("omp", words, "vectors_per_second", rate, "tiles.py", triton, folder=out)
        record("omp", words, "correlation_tflops", rate * flops / 1e12, "torch in e4m3", peak, folder=out)
        print(f"S {sparsity} {way.name}: {rate / 1e6:.1f} M vectors/s, {rate / triton:.2f} of tiles.py's, "
              f"{rate * flops / 1e12 / peak:.1%} of e4m3 products in torch, energy {told}")  # fmt: skip


def measure_peer(peer: Any, layer: CapturedLayer, sparsity: int, case: dict[str, Any], rate: float, args: Any) -> None:
    """Our rate over a peer's on the same vectors, or as many of each head as were asked for."""
    vectors, atoms = groups(layer)
    vectors = vectors[:, : -(-args.peer_vectors // len(vectors))]
    books = [peer.prepare(own) for own in atoms]
    codes = [peer.code(book, own, sparsity) for book, own in zip(books, vectors, strict=True)]
    lost = sum(
        float((own - peer.rebuild(book, code)).double().square().sum())
        for own, book, code in zip(vectors, atoms, codes, strict=True)
    ) / float(vectors.double().square().sum())
    del codes

    def run() -> None:
        for book, own in zip(books, vectors, strict=True):
            peer.code(book, own, sparsity)

    count = vectors.shape[0] * vectors.shape[1]
    theirs = count / milliseconds(run, repeats=3) * 1e3
    words = case | {"peer_vectors": count, "peer_energy_lost": round(lost, 5)}
    record("omp", words, "vectors_per_second", rate, peer.name, theirs, folder=args.out)
    record("omp", words | {"peer": peer.name}, "speedup", rate / theirs, folder=args.out)
    print(f"S {sparsity} {peer.name}: {theirs / 1e3:.1f} k vectors/s on {count} vectors, energy lost {lost:.4f}; "
          f"ours is {rate / theirs:.0f} times as fast")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """All of it."""
    if args.planted:
        layer = planted_layer(args.planted, args.count, "cuda")
    elif args.vectors:
        layer = load_vectors(args.vectors)
    else:
        files = [args.data / f"train_{name}.jsonl.xz" for name in SOURCES]
        layer = capture_vectors(args.model, files, args.dictionary, args.layer, args.count, "cuda")
        if args.save:
            layer.save(args.save)
    layer = layer.to("cuda")
    T, Hk, D = layer.vectors.shape[1:]
    atoms = layer.atoms["key"]
    common = layer.words | {
        "vectors": 2 * T * Hk, "head_dim": D, "atoms": atoms.shape[1], "shared": len(atoms) == 1,
        "dtype": str(layer.vectors.dtype).removeprefix("torch."),
    }  # fmt: skip
    peers: list[Any] = [Authors(args.authors)] if args.authors else []
    peers += [OmpGpu(args.omp_gpu)] if args.omp_gpu else []
    for sparsity in args.sparsities:
        case = common | {"sparsity": sparsity}
        if args.ways:
            measure_ways(layer, sparsity, case, args.out)
            continue
        measure_quality(layer, sparsity, case, args.out)
        rate = measure_rates(layer, sparsity, case, args.out)
        for peer in peers:
            try:
                measure_peer(peer, layer, sparsity, case, rate, args)
            except (RuntimeError, ValueError) as error:  # a peer's failure is its own
                print(f"S {sparsity} {peer.name} failed: {error}", file=sys.stderr)
            torch.cuda.empty_cache()
        record_latencies(layer, sparsity, common | {"sparsity": sparsity}, args.out)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--vectors", type=Path, help="a file that --save wrote; instead of the next three")
    parser.add_argument("--planted", type=int, metavar="D", help="vectors of this size made of random atoms, instead")
    parser.add_argument("--model", help="a checkpoint's folder or hub id")
    parser.add_argument("--data", type=Path, help=f"folder of train_*.jsonl.xz: {', '.join(SOURCES)}")
    parser.add_argument("--dictionary", type=Path, help="the model's, from `vllm-lexico train`")
    parser.add_argument("--layer", type=int, default=14, help="(default: %(default)s)")
    parser.add_argument("--count", type=int, default=131_072, help="vectors, K and V together (default: %(default)s)")
    parser.add_argument("--save", type=Path, help="file to keep the captured vectors and dictionary in")
    parser.add_argument("--sparsities", type=int, nargs="+", default=[15, 7])
    parser.add_argument("--authors", type=Path, metavar="DIR", help="checkout of krafton-ai/lexico")
    parser.add_argument("--omp-gpu", type=Path, metavar="DIR", help="source of orthogonal-matching-pursuit-gpu")
    parser.add_argument("--peer-vectors", type=int, default=131_072, help="for the peers (default: %(default)s)")
    parser.add_argument("--ways", action="store_true", help="compare the ways to code many vectors, and nothing else")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="of results (default: %(default)s)")
    args = parser.parse_args()
    if not args.vectors and not args.planted and not (args.model and args.data and args.dictionary):
        parser.error("give --vectors, --planted, or --model, --data and --dictionary")
    return args


if __name__ == "__main__":
    try:
        run(parse_args())
    except (ValueError, OSError) as error:
        sys.exit(f"omp.py: {error}")
