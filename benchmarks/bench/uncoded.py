"""LEXICO without coding, to measure what the rest costs: `worker_extension_cls="bench.uncoded.Uncoded"`.

Importing this replaces the coding operations by nothing, before a CUDA graph can hold it. Pages then start out with
random codes: what was never written would decode to one atom, which is read faster than many.
"""

from __future__ import annotations

from typing import Any

import torch
from lexico_kernels import KV, LayerCache, LayerStack, ops
from lexico_kernels.memory.records import field_views, scale_view

RANDOM_PAGES = 256  # that differ from each other
_filled: set[tuple[int, int]] = set()  # address and number of pages


class Uncoded:
    """Nothing to add to a worker; vLLM imports the module for it."""


def _fill(cache: LayerCache) -> None:
    pages = cache.code_pages
    for kv in KV:
        for field in field_views(pages, cache.layout, kv):
            random = torch.randint(256, field[:RANDOM_PAGES].shape, dtype=torch.uint8, device=pages.device)
            for block in field.split(RANDOM_PAGES):
                block.copy_(random[: len(block)])
        one = torch.ones(1, dtype=torch.bfloat16, device=pages.device)
        scale_view(pages, cache.layout, kv).copy_(one.view(torch.uint8))


def _fill_once(cache: LayerCache) -> None:
    pages = cache.code_pages
    place = pages.data_ptr(), len(pages)
    if place not in _filled and not (pages.is_cuda and torch.cuda.is_current_stream_capturing()):
        _fill(cache)
        _filled.add(place)


def _omp_encode(key: Any, value: Any, cache: LayerCache, *args: Any, **kwargs: Any) -> None:
    _fill_once(cache)


def _omp_encode_layers(layers: LayerStack, *args: Any, **kwargs: Any) -> None:
    for cache in layers.caches:
        _fill_once(cache)


ops.omp_encode = _omp_encode
ops.omp_encode_layers = _omp_encode_layers
