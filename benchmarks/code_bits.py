"""Hashes of what the operations compute from fixed seeds: a change that should change no bit shows the same lines.

    python benchmarks/code_bits.py                      # twins and a tiny trained dictionary; all kernels on a GPU
    python benchmarks/code_bits.py --vectors FILE       # codes of vectors that `omp.py --save` captured, too
    TRITON_INTERPRET=1 python benchmarks/code_bits.py --only kernels    # kernels in the interpreter, at small sizes

Prints `name sha256` per result, the inputs' first. Compare two trees in one run on one machine: products of matrices
are not the same on all machines.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import torch
from bench.letters_model import write_letters_model
from bench.omp_vectors import load_vectors
from lexico_kernels import KV, CodeLayout, LayerCache, LayerStack, reference
from lexico_kernels.testing import fp8_cache, poisoned_cache, raised_cache, random_problem, records_at
from safetensors.torch import load_file
from torch import Tensor

TWIN_TOKENS, CAPTURED_TOKENS = 1024, 512  # of two KV heads: 4,096 vectors; of as many heads as the model has
Line = tuple[str, str]


class Sizes(NamedTuple):
    """What kernels are run on: (D, S of keys and values, codec) to write, and (D, S, codec, group) to read."""

    tokens: tuple[int, ...]  # that a launch codes
    layers_room: int  # entries of a launch that codes all layers
    atoms: int
    longest: int  # context that is read
    written: tuple[tuple[int, tuple[int, int], str], ...]
    read: tuple[tuple[int, int, str, int], ...]


LARGE = Sizes(
    (40, 2000),
    70,
    4096,
    9000,
    (
        (128, (15, 15), "packed16"),
        (128, (7, 7), "packed16"),
        (128, (9, 31), "packed16"),
        (64, (15, 15), "packed16"),
        (64, (7, 5), "packed16"),
        (128, (15, 15), "exact"),
    ),
    ((128, 15, "packed16", 4), (128, 7, "packed16", 8), (64, 15, "packed16", 3), (128, 15, "exact", 4)),
)
SMALL = Sizes(  # for Triton's interpreter
    (17,),
    9,
    130,
    150,
    ((128, (7, 3), "packed16"), (64, (5, 6), "packed16"), (64, (2, 2), "exact")),
    ((128, 3, "packed16", 4), (64, 5, "packed16", 3), (64, 5, "exact", 2)),
)


def digest(*tensors: Tensor) -> str:
    """sha256 of shapes, dtypes and bytes."""
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        state.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def planted_tokens(count: int, cache: LayerCache, seed: int) -> tuple[Tensor, Tensor]:
    """K and V [count, Hk, D]: sums of 24 atoms of falling size and noise, around their head's mean."""
    generator, out = torch.Generator().manual_seed(seed), []
    for book in (cache.key, cache.value):
        atoms, (Hk, D) = book.atoms.cpu().float(), book.mean.shape
        heads, x = torch.arange(Hk) % len(atoms), 0.02 * torch.randn(count, Hk, D, generator=generator)
        for at in range(24):
            index = torch.randint(1, book.num_atoms, (count, Hk), generator=generator)
            x += 0.85**at * torch.randn(count, Hk, 1, generator=generator) * atoms[heads, index]
        x = x * book.stretch.cpu() + book.mean.cpu()
        out.append(x.to(cache.tail_pages.device, cache.tail_pages.dtype))
    return out[0], out[1]


def encode_lines(
    name: str, encode: Callable[..., None], cache: LayerCache, tokens: tuple[Tensor, Tensor]
) -> Iterator[Line]:
    """Codes of tokens, every third of which comes from the tail where it has room, and some of which are skipped."""
    count, device, R = len(tokens[0]), cache.code_pages.device, cache.layout.tail_tokens
    source, destination = torch.arange(count, dtype=torch.int32), torch.arange(count) + cache.layout.block_tokens
    stored = source[::3][: (len(cache.tail_pages) - 1) * R].long()
    slots = torch.arange(len(stored)) + R
    key, value = (rows[stored.to(device)] for rows in tokens)
    reference.write_tail(key, value, cache, slots.to(device))
    source[stored] = (-1 - slots).int()
    destination[5::11] = -1
    yield f"{name} inputs", digest(*tokens, cache.key.atoms, cache.value.atoms, cache.value.mean, source, destination)
    encode(*tokens, cache, source.to(device), destination.to(device))
    yield name, digest(*coded(cache))


def coded(cache: LayerCache) -> list[Tensor]:
    """What the code pages hold, wherever records lie in them: those of all slots, and what lies behind them."""
    pages, layout = cache.code_pages, cache.layout
    slots = torch.arange(len(pages) * layout.block_tokens, device=pages.device)
    return [*(records_at(cache, slots, kv) for kv in KV), pages[:, layout.page_bytes :]]


def twin_lines(tokens: int = TWIN_TOKENS) -> Iterator[Line]:
    """Codes, attention and dense history of the torch twins on the CPU."""
    for D, S, codec in ((128, (15, 15), "packed16"), (64, (7, 5), "packed16"), (128, (15, 7), "exact")):
        layout = CodeLayout(D, 2, *S, codec=codec, element_bytes=2)
        pages = 2 + tokens // layout.block_tokens
        cache = raised_cache(poisoned_cache(layout, pages, atoms=1024, dtype=torch.bfloat16, seed=D))
        name = f"twin omp_encode {codec} D {D} S {S}"
        yield from encode_lines(name, reference.omp_encode, cache, planted_tokens(tokens, cache, seed=S[0]))
    yield from read_lines(
        "twin", {"sparse_decode": reference.sparse_decode}, reference.reconstruct, "cpu", LARGE._replace(longest=300)
    )


def read_lines(
    name: str, decodes: dict[str, Callable], reconstruct: Callable, device: str, sizes: Sizes
) -> Iterator[Line]:
    """What every `sparse_decode` of `decodes`, and `reconstruct`, return for four requests."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    for D, S, codec, group in sizes.read:
        layout, lengths = (
            CodeLayout(D, 2, S, S, codec=codec),
            [1, sizes.longest // 7, sizes.longest // 2 + 3, sizes.longest],
        )
        problem = random_problem(layout, lengths, atoms=1024, dtype=dtype, device=device, raw_tokens=100)
        request = torch.arange(4, dtype=torch.int32, device=device)
        query = torch.randn(4, 2 * group, D, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        case, seen = f"{codec} D {D} S {S} group {group}", torch.tensor(lengths, dtype=torch.int32, device=device)
        yield f"{name} {case} inputs", digest(query, *coded(problem.cache), problem.cache.key.atoms)
        for which, decode in decodes.items():
            if codec == "exact" and which == "lookup":
                continue
            results = decode(query, problem.cache, problem.tables, request, seen, scale=D**-0.5)
            yield f"{name} {which} {case}", digest(*results)
        position = torch.arange(lengths[2], dtype=torch.int32, device=device)
        dense = torch.empty(2, lengths[2], 2, D, dtype=dtype, device=device)
        reconstruct(problem.cache, problem.tables, torch.full_like(position, 2), position, *dense)
        yield f"{name} reconstruct {case}", digest(dense)


def dictionary_lines() -> Iterator[Line]:
    """The tensors of a dictionary that is trained on the CPU, from one seed, for a tiny random model."""
    from vllm_lexico.train.learn import LearnSettings
    from vllm_lexico.train.run import TrainSettings, train_dictionary

    torch.set_num_threads(1)  # the shapes are so small that threads only wait for each other
    with tempfile.TemporaryDirectory() as folder:
        model, text = write_letters_model(Path(folder) / "model", layers=2, kv_heads=2), Path(folder) / "text.txt"
        text.write_text("the quick brown fox jumps over the lazy dog and some more words to read " * 200)
        learn = LearnSettings(atoms=64, sparsity=4, batch=128)
        settings = TrainSettings(data=(str(text),), learn=learn, vectors=2048, rounds=2, passes=2, sequence_tokens=256)
        with contextlib.redirect_stdout(sys.stderr):  # its progress has times
            out = train_dictionary(str(model), settings, out=Path(folder) / "out.safetensors", device="cpu")
        tensors = load_file(out)
    for name in sorted(tensors):
        yield f"dictionary {name}", digest(tensors[name])


def kernel_lines() -> Iterator[Line]:
    """Every kernel: at serving shapes on a GPU, small ones in Triton's interpreter."""
    from lexico_kernels import reconstruct
    from lexico_kernels.omp_encode import pursuit, tiles
    from lexico_kernels.sparse_decode import lookup, portable

    on_gpu = torch.cuda.is_available()
    device, dtype, sizes = ("cuda", torch.bfloat16, LARGE) if on_gpu else ("cpu", torch.float16, SMALL)
    decodes = {"portable": portable.sparse_decode} | ({"lookup": lookup.sparse_decode} if on_gpu else {})
    yield from write_lines(device, dtype)
    yield from read_lines("kernel", decodes, reconstruct.reconstruct, device, sizes)
    for quantized in (False, True):
        cache = poisoned_cache(CodeLayout(128, 2, 7, 7), 2, atoms=sizes.atoms, dtype=dtype, device=device)
        vectors = torch.stack(planted_tokens(sizes.tokens[-1], cache, 3)).float()[:, :, 0].contiguous()
        atoms, levels = cache.key.atoms, cache.key.levels.repeat(2, 1)
        codes = pursuit.pursue(vectors, atoms, 7, levels if quantized else None)
        yield f"kernel pursue {'quantized' if quantized else 'plain'}", digest(*codes)
    if on_gpu:
        yield from cluster_lines()
    yield from tile_lines("tiles", tiles.omp_encode, device, dtype, sizes)


def write_lines(device: str, dtype: torch.dtype) -> Iterator[Line]:
    """`write_tail`."""
    from lexico_kernels import write_tail

    for D in (64, 128):
        cache = poisoned_cache(CodeLayout(D, 2, 15, 15), 5, atoms=64, dtype=dtype, device=device)
        slots = torch.arange(40, device=device) + cache.layout.tail_tokens
        slots[::7] = -1
        write_tail.write_tail(*planted_tokens(40, cache, D), cache, slots)
        yield f"kernel write_tail D {D}", digest(cache.tail_pages[1:])


def tile_lines(name: str, encode: Callable[..., None], device: str, dtype: torch.dtype, sizes: Sizes) -> Iterator[Line]:
    """`omp_encode` of few and many vectors, with and without fp8 atoms, and `omp_encode_layers`."""
    for D, S, codec in sizes.written:
        layout = CodeLayout(D, 2, *S, codec=codec)
        for count in sizes.tokens:
            for fp8 in (False, True) if codec == "packed16" and D == 128 and S[1] < 16 else (False,):
                pages = 2 + count // layout.block_tokens
                cache = raised_cache(poisoned_cache(layout, pages, atoms=sizes.atoms, dtype=dtype, device=device))
                cache = fp8_cache(cache) if fp8 else cache
                case = f"kernel {name} {codec} D {D} S {S} {count} tokens{' fp8' if fp8 else ''}"
                yield from encode_lines(case, encode, cache, planted_tokens(count, cache, count))
        if name == "tiles":
            yield from layer_lines(layout, device, dtype, sizes)


def layer_lines(layout: CodeLayout, device: str, dtype: torch.dtype, sizes: Sizes) -> Iterator[Line]:
    """`omp_encode_layers` by the kernel in Triton, and by clusters where they can."""
    from lexico_kernels.omp_encode import all_layers, clusters

    room, R = sizes.layers_room, layout.tail_tokens
    for name, encode in (("all_layers", all_layers.omp_encode_layers), ("cluster_layers", clusters.omp_encode_layers)):
        caches = []
        for seed in range(3):
            cache = poisoned_cache(layout, 2 + room // R, atoms=sizes.atoms, dtype=dtype, device=device, seed=seed)
            slots = torch.arange(room, device=device) + R
            reference.write_tail(*planted_tokens(room, cache, seed), cache, slots)
            caches.append(raised_cache(cache))
        stack = LayerStack.of(caches)
        assert stack is not None
        if name == "cluster_layers" and not (device == "cuda" and layout.codec == "packed16"):
            continue
        source, destination = (-1 - slots).int(), slots - R + layout.block_tokens
        destination[-3:] = -1
        encode(stack, source, destination)
        case = f"kernel {name} {layout.codec} D {layout.head_dim} S {layout.key_sparsity, layout.value_sparsity}"
        yield case, digest(*(tensor for cache in caches for tensor in coded(cache)))


def cluster_lines() -> Iterator[Line]:
    """`omp_encode` by clusters of thread blocks, and the product's order of entries after it."""
    from lexico_kernels import ops
    from lexico_kernels.omp_encode import clusters

    for dtype in (torch.bfloat16, torch.float16):
        yield from tile_lines(f"clusters {dtype}", _where_made(clusters.omp_encode), "cuda", dtype, LARGE)
    yield from tile_lines("product", ops.omp_encode, "cuda", torch.bfloat16, LARGE)


def _where_made(encode: Callable[..., None]) -> Callable[..., None]:
    """The kernel for "packed16"; nothing for other codecs, which it is not made for."""

    def encode_packed(key: Tensor, value: Tensor, cache: LayerCache, *entries: Tensor) -> None:
        if cache.layout.codec == "packed16":
            encode(key, value, cache, *entries)

    return encode_packed


def captured_lines(path: Path) -> Iterator[Line]:
    """Codes of captured vectors, by the twin and on a GPU by the product."""
    from lexico_kernels import ops

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for sparsity in (7, 15):
            layer = load_vectors(path).to(device)
            cache, tokens = (
                layer.cache(sparsity),
                (layer.vectors[0, :CAPTURED_TOKENS], layer.vectors[1, :CAPTURED_TOKENS]),
            )
            yield from encode_lines(f"captured {device} S {sparsity}", ops.omp_encode, cache, tokens)


def main() -> None:
    """Print all lines, and one for all of them."""
    parser = argparse.ArgumentParser(description="Print hashes of what the operations compute from fixed seeds.")
    parser.add_argument("--vectors", type=Path, help="captured vectors, as omp.py --save writes them")
    parser.add_argument("--only", choices=("twin", "dictionary", "kernels"), help="one section (default: all)")
    args = parser.parse_args()
    from triton import knobs

    sections = {"twin": twin_lines, "dictionary": dictionary_lines}
    if torch.cuda.is_available() or knobs.runtime.interpret:
        sections["kernels"] = kernel_lines
    lines = []
    for name, section in sections.items():
        if args.only in (None, name):
            for line in section():
                print(*line, flush=True)
                lines.append(" ".join(line))
    if args.vectors:
        for line in captured_lines(args.vectors):
            print(*line, flush=True)
            lines.append(" ".join(line))
    print("all", hashlib.sha256("\n".join(lines).encode()).hexdigest())


if __name__ == "__main__":
    main()
