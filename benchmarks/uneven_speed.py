"""Layers whose heads have two sparsities, or whose keys and values do, beside even layers: decode and coding.

    python benchmarks/uneven_speed.py                   # every case, one GPU with vLLM
    python benchmarks/uneven_speed.py --cases 0 1 --no-record

A step's launches are those of serving, `layer_parts.py`: each part's own, and copies where the parts' heads lie apart
in the model. Results are checked first, attention against float64 and codes against OMP in float64. Then layers are
timed in turn with as many even ones, each with tensors of its own. Writes `uneven_decode_ms`, `uneven_code_ms` (a step
of prefill) and `uneven_code_layers_ms` (a step of decode that codes a span) to benchmarks/results/decode.jsonl, each
beside the even layers'.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # its neighbours are found under PYTHONSAFEPATH too

import decode
import omp
import torch
from bench.omp_vectors import CapturedLayer, planted_layer
from bench.record import record
from lexico_kernels import KV, CodeLayout, ops
from lexico_kernels.memory.layout import SPAN_TOKENS
from lexico_kernels.testing import TOLERANCES
from lexico_kernels.timing import milliseconds
from torch import Tensor

from vllm_lexico.serve.layer_parts import HeadOrder, LayerParts, stacked

ROUNDS = 3  # in which both are timed in turn
CHECKED_TOKENS = 128  # of a layer's codes


class Heads(NamedTuple):
    """How many KV heads a part has, and their atoms per vector."""

    number: int
    key: int
    value: int


Parts = tuple[Heads, ...]


@dataclass(frozen=True)
class Case:
    """Layers beside as many even ones.

    Attributes:
        sparsity: of the even ones.
        layers: parts of each of the others.
        moved: whether the parts' heads lie apart in the model, so that a step copies its queries, keys and values.
        batch, context: of a step of decode.
        coded_tokens: of a step of prefill.
    """

    sparsity: int
    layers: tuple[Parts, ...]
    moved: bool = False
    batch: int = 16
    context: int = 32768
    coded_tokens: int = 8192
    kv_heads: int = 8
    heads: int = 32
    head_dim: int = 128

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads

    @property
    def layout(self) -> CodeLayout:
        """Of an even layer's pages."""
        return CodeLayout(
            self.head_dim, self.kv_heads, self.sparsity, self.sparsity, block_tokens=decode.BLOCK_TOKENS
        )  # fmt: skip

    def layouts(self, parts: Parts) -> list[CodeLayout]:
        """Of a layer's parts."""
        even = replace(self.layout, raw_tokens=self.layout.tail_tokens)
        return [
            replace(even, num_kv_heads=part.number, key_sparsity=part.key, value_sparsity=part.value) for part in parts
        ]

    @property
    def bytes_ratio(self) -> float:
        """Of the layers' codes to the even ones'."""
        own = sum(self.code_bytes(parts) for parts in self.layers)
        return own / (len(self.layers) * self.layout.page_bytes)

    def code_bytes(self, parts: Parts) -> int:
        """Of a layer's codes in a page."""
        return sum(layout.page_bytes for layout in self.layouts(parts))

    def even(self) -> Case:
        """The same with even layers."""
        return replace(self, layers=((Heads(self.kv_heads, self.sparsity, self.sparsity),),) * len(self.layers))

    def order(self, device: str) -> HeadOrder | None:
        """Of the heads in the parts."""
        if not self.moved:
            return None
        kv_heads = torch.randperm(self.kv_heads, generator=torch.Generator().manual_seed(0)).to(device)
        own = torch.arange(self.group, device=device)
        return HeadOrder(kv_heads, (kv_heads[:, None] * self.group + own).flatten())


def unlike(low: int, high: int, counts: Sequence[int], kv_heads: int = 8) -> tuple[Parts, ...]:
    """Layers with so many heads of `high` atoms each, the others of `low`."""
    return tuple((Heads(count, high, high), Heads(kv_heads - count, low, low)) for count in counts)


FIFTH, THIRD = (2, 2, 2, 1, 1), (3, 3, 2)  # heads of 8 whose layers have just the even ones' bytes
CASES = [
    Case(15, unlike(11, 31, FIFTH)),
    Case(15, unlike(11, 31, FIFTH), moved=True),
    Case(15, unlike(11, 31, (2,))),  # more bytes than even
    Case(7, unlike(3, 15, THIRD)),
    Case(7, unlike(3, 15, THIRD), moved=True),
    Case(7, unlike(3, 15, (2,))),  # fewer
    Case(15, ((Heads(8, 16, 14),),)),  # the setting {"key": 16, "value": 14}
]


@dataclass(frozen=True)
class PartCase(decode.Case):
    """A part of a layer as a layer of its own. value_sparsity, raw_tokens: as in `CodeLayout`."""

    value_sparsity: int = 15
    raw_tokens: int = 0

    @property
    def layout(self) -> CodeLayout:
        """Of the pages."""
        return replace(super().layout, value_sparsity=self.value_sparsity, raw_tokens=self.raw_tokens)


@dataclass(frozen=True)
class DecodeLayer:
    """A layer in a step of decode.

    Attributes:
        parts: of the layer.
        steps: each part's share of the step, with the tables of all.
        batch: queries, keys and values [T, heads, D] in the model's order.
    """

    parts: LayerParts
    steps: list[decode.Step]
    batch: tuple[Tensor, Tensor, Tensor]

    @classmethod
    def random(cls, case: Case, parts: Parts, device: str) -> DecodeLayer:
        """Random codes, as `decode.Step.random` makes them for each part; all in one run of bytes per block."""
        steps = []
        for part in parts:
            sizes = part.number, part.number * case.group, case.head_dim, part.value, case.layout.tail_tokens
            steps.append(decode.Step.random(PartCase(case.batch, case.context, part.key, *sizes), device))
        caches, order = [step.cache for step in steps], case.order(device)
        own = torch.cat([cache.code_pages for cache in caches], 1)
        tail = torch.cat([cache.tail_pages for cache in caches], 1)
        books, given = [(cache.key, cache.value) for cache in caches], own.new_empty(1, case.layout.page_bytes)
        layouts = case.layouts(parts)
        layer = LayerParts.cut(given, own, tail, books, case.layout, layouts, order, case.group)
        query = torch.cat([step.query for step in steps], 1)
        if order is not None:
            query = torch.empty_like(query).index_copy_(1, order.heads, query)
        key, value = torch.randn(2, case.batch, case.kv_heads, case.head_dim, device=device).to(query.dtype)
        return cls(layer, steps, (query, key, value))

    def attend(self) -> Tensor:
        """What `LexicoImpl.forward` does of it, after the step's tokens are stored."""
        (query, key, value), order = self.batch, self.parts.order
        if order is not None:
            query, key, value = order.batch(query, key, value)
        first, attended = self.steps[0], torch.empty_like(query)
        step = query, first.tables, first.request, first.lengths
        self.parts.sparse_decode(*step, scale=first.scale, out=attended)
        if order is None:
            return attended
        return torch.empty_like(query).index_copy_(1, order.heads, attended)

    def error(self) -> float:
        """The largest error of a part's results against float64, as a share of the results."""
        attended = self.attend() if self.parts.order is None else self.attend()[:, self.parts.order.heads]
        shares = attended.split([step.query.shape[1] for step in self.steps], 1)
        return max(decode.error(share, step) for share, step in zip(shares, self.steps, strict=True))


@dataclass(frozen=True)
class CodedLayer:
    """A layer whose tokens are coded.

    Attributes:
        parts: of the layer.
        captured: each part's vectors and dictionary.
        sparsities: of each part, keys' and values'.
        batch: keys and values [T, Hk, D] in the model's order.
    """

    parts: LayerParts
    captured: list[CapturedLayer]
    sparsities: list[tuple[int, int]]
    batch: tuple[Tensor, Tensor]

    @classmethod
    def planted(cls, case: Case, parts: Parts, layer: CapturedLayer) -> CodedLayer:
        """Empty pages for a layer's vectors, a span of which is in the tail too."""
        key, value = layer.vectors
        device, layouts, order = str(key.device), case.layouts(parts), case.order(str(key.device))
        heads = torch.arange(case.kv_heads, device=key.device) if order is None else order.kv_heads
        captured = [_of_heads(layer, own) for own in heads.split([part.number for part in parts])]
        books = [
            (own.book("key", part.key), own.book("value", part.value))
            for own, part in zip(captured, parts, strict=True)
        ]
        pages, R = 1 + -(-len(key) // case.layout.block_tokens), case.layout.tail_tokens
        # An engine's layers lie in one run, at equal strides.
        widest = max(case.code_bytes(each) for each in case.layers)
        own = torch.zeros(pages, widest, dtype=torch.uint8, device=device)[:, : case.code_bytes(parts)]
        shape = 1 + -(-SPAN_TOKENS // R), case.kv_heads, R, 2, case.head_dim
        tail, given = torch.zeros(shape, dtype=key.dtype, device=device), own.new_empty(1, case.layout.page_bytes)
        made = cls(
            LayerParts.cut(given, own, tail, books, case.layout, layouts, order, case.group),
            captured,
            [(part.key, part.value) for part in parts],
            (key, value),
        )
        key, value = (rows[:SPAN_TOKENS] for rows in made._in_order())
        made.parts.write_tail(key, value, R + torch.arange(SPAN_TOKENS, device=device))
        return made

    def _in_order(self) -> tuple[Tensor, Tensor]:
        """Keys and values as the parts want them."""
        (key, value), order = self.batch, self.parts.order
        if order is None:
            return key, value
        return key.index_select(1, order.kv_heads), value.index_select(1, order.kv_heads)

    def code(self) -> None:
        """What a step of prefill does of it."""
        source = torch.arange(len(self.batch[0]), device=self.batch[0].device, dtype=torch.int32)
        places = source.long() + self.parts.whole.layout.block_tokens
        self.parts.omp_encode(*self._in_order(), source, places, relative_error=0.0)

    def energy_ratio(self) -> float:
        """The largest ratio of a part's residual energy to that of OMP in float64, quantized as the codes."""
        ratios = []
        for part, layer, own in zip(self.parts.parts, self.captured, self.sparsities, strict=True):
            few = replace(layer, vectors=layer.vectors[:, :CHECKED_TOKENS])
            for kv, sparsity in zip(KV, own, strict=True):
                ratios.append(omp.stored_energy(few, part.cache, kv) / omp.float64_lost(few, kv, sparsity)[1])
        return max(ratios)


def _of_heads(layer: CapturedLayer, heads: Tensor) -> CapturedLayer:
    """The same of some heads."""
    atoms, means, stretches = (
        {kv: tensor[heads] for kv, tensor in tensors.items()} for tensors in (layer.atoms, layer.means, layer.stretches)
    )
    return replace(layer, vectors=layer.vectors[:, :, heads], atoms=atoms, means=means, stretches=stretches)


def span_coder(layers: Sequence[CodedLayer]) -> Callable[[], None]:
    """What a step of decode does that codes a span of all layers, in as many launches as there are sparsities."""
    stacks = stacked([cache for layer in layers for cache in layer.parts.caches_to_stack()])
    layout, device = layers[0].parts.whole.layout, layers[0].batch[0].device
    assert stacks, "layers that an engine codes together do not stack"
    span = torch.arange(SPAN_TOKENS, device=device)
    source, places = (-1 - layout.tail_tokens - span).int(), layout.block_tokens + span

    def code() -> None:
        for stack in stacks:
            ops.omp_encode_layers(stack, source, places)

    return code


def in_turn(one: Callable[[], object], other: Callable[[], object], clock: Callable) -> tuple[float, float]:
    """Median times of both, in ms."""
    times = [(clock(one), clock(other)) for _ in range(ROUNDS)]
    return median(own for own, _ in times), median(own for _, own in times)


def decode_layers(case: Case, device: str) -> list[DecodeLayer]:
    """All of a case."""
    return [DecodeLayer.random(case, parts, device) for parts in case.layers]


def coded_layers(case: Case, device: str) -> list[CodedLayer]:
    """All of a case, each with a dictionary of its own place."""
    planted = planted_layer(case.head_dim, 2 * case.kv_heads * case.coded_tokens, device)
    return [
        CodedLayer.planted(case, parts, planted.spread(case.kv_heads, False, index))
        for index, parts in enumerate(case.layers)
    ]


def run_decode(case: Case, *, keep: bool, device: str = "cuda") -> bool:
    """Check and time attention; False, and no row, where it is not right."""
    own, even = decode_layers(case, device), decode_layers(case.even(), device)
    wrong, allowed = max(layer.error() for layer in own), TOLERANCES["attention", decode.DTYPE][1]
    if not wrong <= allowed:
        print(f"  NOT RIGHT: error {wrong:.2e}; allowed {allowed:.2e}", flush=True)
        return False
    attend = [lambda layers=layers: [layer.attend() for layer in layers] for layers in (own, even)]
    took, peer = in_turn(attend[0], attend[1], decode.graph_ms)
    _tell(case, "uneven_decode_ms", took, peer, {"error": wrong}, keep)
    return True


def run_coding(case: Case, *, keep: bool, device: str = "cuda") -> bool:
    """The same of coding."""
    own, even = coded_layers(case, device), coded_layers(case.even(), device)
    for layer in (*own, *even):
        layer.code()
    ratio = max(layer.energy_ratio() for layer in own)
    if not ratio < omp.MOST_ENERGY:
        print(f"  NOT RIGHT: residual energy {ratio:.4f} of float64's; allowed {omp.MOST_ENERGY}", flush=True)
        return False
    code = [lambda layers=layers: [layer.code() for layer in layers] for layers in (own, even)]
    _tell(case, "uneven_code_ms", *in_turn(code[0], code[1], milliseconds), {"energy_ratio": ratio}, keep)
    spans = in_turn(span_coder(own), span_coder(even), decode.graph_ms)
    _tell(case, "uneven_code_layers_ms", *spans, {"energy_ratio": ratio}, keep)
    return True


def _tell(case: Case, metric: str, took: float, peer: float, found: dict[str, float], keep: bool) -> None:
    """Print a result, and record it."""
    print(f"  {metric} {took:.4f}, even {peer:.4f}: {took / peer:.3f} times as long, {found}", flush=True)
    if keep:
        described = asdict(case) | {"atoms": decode.ATOMS, "bytes_ratio": case.bytes_ratio} | found
        record("decode", described, metric, took, peer="even heads", peer_value=peer)


def main() -> None:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, nargs="+", default=[*range(len(CASES))], help="by number (default: all)")
    parser.add_argument("--no-record", action="store_true", help="only print")
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    right = True
    for case in (CASES[index] for index in args.cases):
        print(f"{case}, {case.bytes_ratio:.4f} of the bytes", flush=True)
        for run in (run_decode, run_coding):
            right &= run(case, keep=not args.no_record)
            torch.cuda.empty_cache()
    sys.exit(0 if right else "uneven_speed.py: not every case was right, see above")


if __name__ == "__main__":
    main()
