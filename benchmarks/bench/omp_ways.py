"""Ways to code many vectors that one run compares: in Triton, and on Hopper past a streaming dictionary."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from lexico_kernels.memory.pages import LayerCache
from lexico_kernels.omp_encode import streams, tiles
from lexico_kernels.timing import milliseconds
from torch import Tensor

Encode = Callable[[Tensor, Tensor, LayerCache, Tensor, Tensor], None]


class Way(NamedTuple):
    """A name for rows of results, and what codes."""

    name: str
    encode: Encode


def ways_for(cache: LayerCache) -> list[Way]:
    """Those that can code into these pages, Triton's first."""
    ways = [Way("tiles.py", tiles.omp_encode)]
    no_tokens = cache.tail_pages[:0, :, 0, 0], cache.tail_pages[:0, :, 0, 1]
    if streams.supports_tensors(*no_tokens, cache):
        ways.append(Way("streams.py", streams.omp_encode))
    return ways


def e4m3_tflops(rows: int, columns: int, inner: int) -> float:
    """TFLOP/s of torch's product of e4m3 matrices [rows, inner] and [inner, columns] into bf16, for the scale."""
    one = torch.ones((), device="cuda")
    a, b = (torch.randn(n, inner, device="cuda").to(torch.float8_e4m3fn) for n in (rows, columns))

    def multiply() -> None:
        torch._scaled_mm(a, b.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    return 2 * rows * columns * inner / milliseconds(multiply) / 1e9
