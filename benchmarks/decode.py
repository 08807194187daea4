"""A decode step's attention from codes, LEXICO against what vLLM reads dense or quantized history with.

    python benchmarks/decode.py                   # every case, one GPU with vLLM
    python benchmarks/decode.py --cases 0 1 --no-record
    python benchmarks/decode.py --cases 0 4 --launches off on --layers 8

First the results are checked: LEXICO's error against float64 must be no more than that of bf16 FlashAttention on the
cache that the codes stand for. Then each is timed as a CUDA graph, everything included. Writes `decode_ms` of each case
and `speedup` over each peer to benchmarks/results/decode.jsonl.

--launches measures ways for kernels to follow one another (`lexico_kernels/device/overlap.py`), whose answers must be
those of ordinary launches, bit for bit; speedups are those of the way that is used in serving. With --layers a graph
has so many layers, each with pages and dictionaries of its own, and the time is a layer's: then dictionaries come from
memory, as in an engine, and not from what the last call left in L2. Peers have one layer, whose history is larger than
L2 in every case.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import torch
from bench import decode_peers as peers
from bench.record import record
from lexico_kernels import CodeLayout, LayerCache, RequestTables, reference
from lexico_kernels import ops as kernels
from lexico_kernels.device import launch, overlap
from lexico_kernels.memory.records import scale_view
from lexico_kernels.omp_encode import entry_order as order
from lexico_kernels.testing import random_codebook
from lexico_kernels.timing import captured, graph_milliseconds
from torch import Tensor

ATOMS, BLOCK_TOKENS, DTYPE = 4096, 128, torch.bfloat16
LAUNCHES = ("off", "on")  # whether kernels start before the one before has ended
CALLS, REPEATS = 5, 9  # in a graph that is timed, and of it
RAW_TOKENS = 160  # of the window, on average: 128 and half a group of 32, in whole pages
# Codes of random atoms make keys about this many times too small for scores that differ as real ones do (deviation 1).
KEY_SCALE = 8.0
PEAK_BYTES_S = 3.35e12  # of an H100's memory
CHUNK = 8192  # tokens that are rebuilt at a time


@dataclass(frozen=True)
class Case:
    """Shapes of one step."""

    batch: int
    context: int
    sparsity: int
    kv_heads: int = 8
    heads: int = 32
    head_dim: int = 128
    value_sparsity: int | None = None  # where it is not that of keys

    @property
    def layout(self) -> CodeLayout:
        """Of the pages."""
        sparsities = self.sparsity, self.value_sparsity or self.sparsity
        return CodeLayout(self.head_dim, self.kv_heads, *sparsities, block_tokens=BLOCK_TOKENS)


CASES = [
    Case(16, 32768, 15),
    Case(16, 32768, 7),
    Case(1, 131072, 15),
    Case(1, 131072, 7),
    Case(64, 2048, 15),
    Case(8, 32768, 15),
    Case(16, 8192, 15),
    Case(16, 32768, 15, 2, 12),  # Qwen2.5-Coder-1.5B
    Case(16, 32768, 7, 2, 12),
    Case(16, 32768, 15, 2, 14, 64),  # Qwen2.5-Coder-0.5B
    Case(8, 32768, 31, 2, 16, 256),  # Qwen3-Next-80B, Qwen3.5-35B-A3B
    Case(8, 32768, 15, 2, 16, 256),
    Case(8, 32768, 31, 4, 24, 256),  # Qwen3.5-27B
    Case(32, 8192, 31, 1, 4, 256),  # Gemma 3 270M and 1B
    Case(32, 8192, 15, 1, 4, 256),
    Case(8, 32768, 15, 2, 32),  # Nemotron 3 Nano
    Case(8, 32768, 7, 8, 64, 64),  # gpt-oss-20b
    Case(64, 2048, 7),
    Case(256, 512, 15),
    Case(256, 512, 7),
    Case(16, 8192, 7),
    Case(16, 32768, 15, 8, 40),  # Qwen3-14B
    Case(16, 32768, 15, 4, 28),  # Qwen2.5-7B
    Case(16, 32768, 15, 8, 64),  # Qwen3-32B
    Case(16, 32768, 15, 8, 96),  # GLM-4.5
    Case(16, 32768, 16, value_sparsity=14),
    Case(16, 8192, 16, value_sparsity=14),
]


@dataclass(frozen=True)
class Step:
    """A decode step over random codes on the device: the arguments of `sparse_decode`."""

    query: Tensor
    cache: LayerCache
    tables: RequestTables
    request: Tensor
    lengths: Tensor

    @classmethod
    def random(cls, case: Case, device: str = "cuda", seed: int = 0) -> Step:
        """Codes with any atom and level, scales alike, atoms of each head's own; sinks of a page, a raw window."""
        layout, batch, context = case.layout, case.batch, case.context
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        pages, tails, R = -(-context // BLOCK_TOKENS), -(-context // layout.tail_tokens), layout.tail_tokens
        codes = torch.randint(-(1 << 62), 1 << 62, (1 + batch * pages, layout.page_bytes // 8), device=device)
        codes = codes.view(torch.uint8)
        for part, size in (("key", KEY_SCALE), ("value", 1.0)):
            scales = scale_view(codes, layout, part)
            values = size * (0.5 + 0.5 * torch.rand(scales.shape[:-1], device=device))
            scales.copy_(values.bfloat16()[..., None].view(torch.uint8))
        raw_start = max(R, (context - RAW_TOKENS) // R * R)
        raw_pages = [0, *range(raw_start // R, tails)]
        tail_table = torch.zeros(batch, tails, dtype=torch.int32)
        tail_table[:, raw_pages] = 1 + torch.arange(batch * len(raw_pages)).int().view(batch, -1)
        tail = torch.randn(1 + batch * len(raw_pages), case.kv_heads, R, 2, case.head_dim, device=device).to(DTYPE)
        table = 1 + torch.randperm(batch * pages, generator=generator).int().view(batch, pages)
        key, value = (random_codebook(ATOMS, layout, generator, torch.device(device), DTYPE) for _ in range(2))
        for book in (key, value):
            book.mean.zero_()  # bf16 keys with large means, as some models have, would make the peer's error larger
        cache = LayerCache(codes, tail, key, value, layout, case.heads // case.kv_heads)
        if order.supports(cache):  # as `omp_encode` leaves them
            order.order_entries(cache, torch.arange(BLOCK_TOKENS, len(codes) * BLOCK_TOKENS, device=device))
        tables = RequestTables(
            table.to(device),
            tail_table.to(device),
            *(torch.full((batch,), where, dtype=torch.int32, device=device) for where in (R, raw_start)),
        )
        return cls(
            torch.randn(batch, case.heads, case.head_dim, device=device).to(DTYPE),
            cache,
            tables,
            torch.arange(batch, dtype=torch.int32, device=device),
            torch.full((batch,), context, dtype=torch.int32, device=device),
        )

    @property
    def scale(self) -> float:
        """Of the scores."""
        return self.query.shape[2] ** -0.5

    def attend(self) -> Tensor:
        """The step by LEXICO."""
        return kernels.sparse_decode(self.query, self.cache, self.tables, self.request, self.lengths, scale=self.scale)[
            0
        ]

    def dense(self) -> peers.Dense:
        """The history that the codes stand for, in bf16."""
        batch, context = len(self.request), int(self.lengths[0])
        shape = (batch, context, self.cache.layout.num_kv_heads, self.cache.layout.head_dim)
        key, value = (torch.empty(shape, dtype=DTYPE, device=self.query.device) for _ in range(2))
        for b in range(batch):
            for position in torch.arange(context, dtype=torch.int32, device=self.query.device).split(CHUNK):
                rows = slice(int(position[0]), int(position[-1]) + 1)
                request = torch.full_like(position, b)
                kernels.reconstruct(self.cache, self.tables, request, position, key[b, rows], value[b, rows])
        return peers.Dense(self.query, key, value, self.scale)

    def exact(self, request: int) -> Tensor:
        """A request's attention in float64 [Hq, D], from the codes themselves."""
        Hk = self.cache.layout.num_kv_heads
        q = self.query[request].double().view(Hk, -1, self.query.shape[2])
        scores, tops = [], []
        context = int(self.lengths[request])
        for positions in torch.arange(context, device=self.query.device).split(CHUNK):
            keys, values = reference.history(self.cache, self.tables, request, positions)
            s = torch.einsum("hgd,nhd->hgn", q, keys.double()) * self.scale
            scores.append(torch.einsum("hgn,nhd->hgd", s.softmax(-1), values.double()))
            tops.append(s.logsumexp(-1))
        weights = torch.stack(tops).softmax(0)
        return (weights[..., None] * torch.stack(scores)).sum(0).flatten(0, 1)


def graph_ms(call: Callable[[], object]) -> float:
    """Median time of a call in a replayed CUDA graph of several."""
    return graph_milliseconds(call, CALLS, REPEATS)


def error(result: Tensor, step: Step) -> float:
    """Root mean square error of the first and the last request against float64, as a share of the result's."""
    requests = sorted({0, len(step.request) - 1})
    exact = torch.stack([step.exact(request) for request in requests])
    return float((result[requests].double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


def measure_peers(dense: peers.Dense, step: Step) -> dict[str, tuple[float, float]]:
    """Time in ms and error of each peer that runs; FlashAttention with the better of two block sizes."""
    makers: dict[str, list[Callable[[], Callable[[], Tensor]]]] = {
        "FLASH_ATTN": [partial(peers.flash_attention, dense, block_tokens=size) for size in (16, 128)],
        "fp8": [partial(peers.flash_attention, dense, fp8=True)],
        "turboquant_3bit_nc": [partial(peers.turboquant, dense)],
    }
    measured = {}
    for name, ways in makers.items():
        try:
            results = []
            for make in ways:
                call = make()
                results.append((graph_ms(call), error(call(), step)))
            measured[name] = min(results)
        except Exception as problem:  # a peer that this vLLM or this GPU does not run
            print(f"  {name} is left out: {type(problem).__name__}: {str(problem).splitlines()[:1]}", flush=True)
        torch.cuda.empty_cache()
    return measured


@contextlib.contextmanager
def launched(name: str) -> Iterator[None]:
    """Meanwhile kernels follow one another in this way."""
    before = launch.OVERLAP
    launch.OVERLAP = name == "on"
    try:
        yield
    finally:
        launch.OVERLAP = before


def attend_all(steps: Sequence[Step]) -> list[Tensor]:
    """A step of each layer."""
    return [step.attend() for step in steps]


def measure(steps: Sequence[Step], launches: Sequence[str]) -> dict[str, float]:
    """Time of a layer in ms in each way for its kernels to follow one another; infinite where answers are others."""
    with launched("off"):
        want = attend_all(steps)
    took = {}
    for name in launches:
        with launched(name):
            graph, given = captured(lambda: attend_all(steps))
            same = True
            for _ in range(REPEATS):
                graph.replay()
                same &= all(map(torch.equal, given, want))
            took[name] = graph_ms(lambda: attend_all(steps)) / len(steps) if same else float("inf")
    return took


def run(case: Case, *, launches: Sequence[str], layers: int, keep: bool) -> bool:
    """Check and time one case against every peer; False, and no rows, where it is less exact than FlashAttention."""
    steps = [Step.random(case, seed=layer) for layer in range(layers)]
    wrong = error(steps[0].attend(), steps[0])
    took = measure(steps, launches)
    layout = case.layout
    vectors = case.batch * case.context * case.kv_heads
    print(f"{case}: error {wrong:.2e}", flush=True)
    for name, ms in took.items():
        share = vectors * layout.token_bytes / (ms * 1e-3) / PEAK_BYTES_S
        print(
            f"  launches {name}: {ms * 1e3:.1f} us, {vectors / ms / 1e6:.1f} G token-heads/s, its codes at {share:.1%} "
            "of the memory's peak",
            flush=True,
        )
    measured = measure_peers(steps[0].dense(), steps[0])
    for peer, (peer_ms, peer_error) in measured.items():
        ratios = ", ".join(f"{peer_ms / ms:.2f} ({name})" for name, ms in took.items())
        print(f"  {peer}: {peer_ms * 1e3:.1f} us, error {peer_error:.2e}: {ratios} times as long", flush=True)
    flash_error = measured["FLASH_ATTN"][1]
    if wrong > flash_error:
        print(f"  NOT RIGHT: error {wrong:.2e} is more than bf16 FlashAttention's {flash_error:.2e}", flush=True)
    others = [name for name, ms in took.items() if ms == float("inf")]
    if others:
        print(f"  NOT RIGHT: launches {', '.join(others)} do not give the bits of ordinary launches", flush=True)
    if wrong > flash_error or others:
        return False
    if keep:
        described = asdict(case) | {"bytes_percent": 100 * layout.ratio, "atoms": ATOMS, "error": wrong}
        keep_rows(described | {"layers": layers}, took, measured)
    return True


def keep_rows(described: dict[str, object], took: dict[str, float], measured: dict[str, tuple[float, float]]) -> None:
    """Record a case: each way's time, and the speedup of that which serves."""
    for name, ms in took.items():
        record("decode", described | {"launches": name}, "decode_ms", ms)
    if (own := served()) not in took:
        return
    for peer, (peer_ms, peer_error) in measured.items():
        row = described | {"launches": own, "peer_error": peer_error, "peer_ms": peer_ms}
        record("decode", row, "speedup", peer_ms / took[own], peer=peer, peer_value=1.0)


def served() -> str:
    """The way in which kernels follow one another in serving on this GPU."""
    return "on" if launch.OVERLAP and overlap.supports(torch.cuda.current_device()) else "off"


def main() -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, nargs="+", default=[*range(len(CASES))], help="by number (default: all)")
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, help="by name (default: as in serving)")
    parser.add_argument("--layers", type=int, default=1, help="with pages and dictionaries of their own (default: 1)")
    parser.add_argument("--no-record", action="store_true", help="only print")
    args = parser.parse_args()
    launches = args.launches or [served()]
    if launches != ["off"] and not overlap.supports(torch.cuda.current_device()):
        parser.error(
            "on this GPU kernels start one after another: it needs sm_90 or newer for more than --launches off"
        )
    print(torch.cuda.get_device_name())
    right = True
    for index in args.cases:
        right &= run(CASES[index], launches=launches, layers=args.layers, keep=not args.no_record)
        torch.cuda.empty_cache()
    sys.exit(0 if right else "decode.py: not every case was right, see above")


if __name__ == "__main__":
    main()
