"""Layers of LEXICO with pages and builders but no model, and steps through them; what they launch is only recorded.

No GPU is needed: a launch in Triton ends where its specialisation is known, one in CUDA C++ where its macros are.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from lexico_kernels import ops, write_tail
from lexico_kernels.device import nvrtc
from lexico_kernels.device.launch import OVERLAP
from lexico_kernels.memory.layout import KV
from lexico_kernels.omp_encode import clusters, entry_order
from lexico_kernels.sparse_decode import lookup
from lexico_kernels.testing import random_codebook
from torch import Tensor, nn


class Shape(NamedTuple):
    """A model's layers, and an engine's settings."""

    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    sparsity: int = 15
    atoms: int = 64
    dtype: torch.dtype = torch.bfloat16
    soft_cap: float = 0.0
    sinks: bool = False
    fp8: bool = False
    codec: str = "packed16"
    prefix_hits: str = "codes"
    drafts: int = 0
    block_tokens: int = 128
    max_model_len: int = 4096
    max_requests: int = 40
    max_tokens: int = 4096  # of a step
    cuda_cpp: bool = True  # what NVRTC compiles can be used
    clusters: bool = True
    coded_later: int = 0
    beside_states: int = 0
    atoms_by_head: tuple[tuple[int, ...], ...] = ()  # of both layers, where sparsities differ


Request = tuple[int, int]  # new tokens, and tokens that are computed already


class Runner:
    """Two layers of a shape, their builders, and block tables of vLLM's first runner.

    Args:
        base_config: an engine's, which is copied and changed.
        shape: of the layers.
        num_pages: of either kind.

    Attributes:
        config: vLLM's.
        layers: vLLM's `static_forward_context`.
        names: of the layers that attend.
        codes, tail: the builders.
        num_code_pages: pages from page 1 on that the table of codes names.
    """

    def __init__(self, base_config: Any, shape: Shape, num_pages: int = 9) -> None:
        from vllm.v1.kv_cache_interface import FullAttentionSpec
        from vllm.v1.worker.block_table import MultiGroupBlockTable

        from vllm_lexico.config import LexicoConfig, Sparsity
        from vllm_lexico.serve import metadata
        from vllm_lexico.serve.setup import LexicoSetup
        from vllm_lexico.serve.tail_layer import add_tail_layer

        self.shape, self.num_pages, self.config = shape, num_pages, copy.deepcopy(base_config)
        self.config.model_config.max_model_len = shape.max_model_len
        self.config.scheduler_config.max_num_seqs = shape.max_requests
        self.config.scheduler_config.max_num_batched_tokens = shape.max_tokens
        self.config.cache_config.block_size = shape.block_tokens
        self.layers: dict[str, Any] = self.config.compilation_config.static_forward_context
        sparsity = Sparsity(shape.sparsity, shape.sparsity)
        settings = LexicoConfig(
            sparsity=sparsity, codec=shape.codec, prefix_hits=shape.prefix_hits, coded_later=shape.coded_later
        )
        by_head = tuple(enumerate(shape.atoms_by_head))
        setup = LexicoSetup(settings, None, shape.drafts, 1, shape.beside_states, sparsities=by_head)
        self.layout = setup.layout(shape.head_dim, shape.kv_heads, shape.block_tokens, shape.dtype)
        self.names = [f"model.layers.{index}.attn" for index in range(2)]
        pages = self._packed_pages(num_pages) if by_head else [self._pages(num_pages) for _ in self.names]
        for index, name in enumerate(self.names):
            layer = self._layer(setup, index)
            self.layers[name] = layer
            layer.impl.tail_name = add_tail_layer(name, layer, setup, self.layers)
            shadow = self.layers[layer.impl.tail_name]
            layer.kv_cache, shadow.kv_cache = pages[index]
        codes_spec = FullAttentionSpec(
            block_size=shape.block_tokens,
            num_kv_heads=shape.kv_heads,
            head_size=shape.head_dim,
            dtype=shape.dtype,
            state_content_bytes=self.layout.cell_bytes,
        )
        shadows = [self.layers[name].impl.tail_name for name in self.names]
        tail_spec = self.layers[shadows[0]].get_kv_cache_spec(self.config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metadata.LexicoSetup, "of", classmethod(lambda *_: setup))
            self.codes = metadata.LexicoMetadataBuilder(codes_spec, self.names, self.config, torch.device("cpu"))
            self.tail = metadata.LexicoTailMetadataBuilder(tail_spec, shadows, self.config, torch.device("cpu"))
        for builder in (self.codes, self.tail):
            builder.reorder_batch_threshold = 1 + shape.drafts
        self.codes._reported = True
        self.page_tokens = shape.block_tokens, self.layout.tail_tokens
        self.tables = MultiGroupBlockTable(
            max_num_reqs=shape.max_requests,
            max_num_batched_tokens=shape.max_tokens,
            pin_memory=False,
            device=torch.device("cpu"),
            block_sizes=list(self.page_tokens),
            max_num_blocks=[-(-shape.max_model_len // size) for size in self.page_tokens],
        )
        self.num_code_pages = self.tables[0].get_device_tensor(shape.max_requests).numel()

    def _layer(self, setup: Any, index: int) -> Any:
        from vllm_lexico.serve.codebooks import LayerCodebooks
        from vllm_lexico.serve.impl import CODEBOOKS, LexicoImpl

        shape = self.shape
        impl = object.__new__(LexicoImpl)
        impl.vllm_config, impl.setup = self.config, setup
        impl.num_heads, impl.num_kv_heads, impl.head_size = shape.heads, shape.kv_heads, shape.head_dim
        impl.scale, impl.soft_cap = shape.head_dim**-0.5, shape.soft_cap
        impl.sinks = torch.zeros(shape.heads) if shape.sinks else None
        impl._cache, impl._bound_to, impl._later, impl.layer_index = None, (0, 0, 0), None, index
        layer: Any = nn.Module()
        layer.impl, layer.num_kv_heads, layer.head_size = impl, shape.kv_heads, shape.head_dim
        layer.kv_cache_torch_dtype = shape.dtype
        generator, place = torch.Generator().manual_seed(0), torch.device("cpu")
        module, parts = LayerCodebooks(), setup.part_layouts(self.layout, index)
        for part, layout in enumerate(parts):
            books = {kv: random_codebook(shape.atoms, layout, generator, place, shape.dtype) for kv in KV}
            if shape.fp8:
                books = {kv: book.with_fp8_atoms() for kv, book in books.items()}
            module.load(books, part)
        order = [head for heads in setup.heads_by_sparsity(index, shape.kv_heads).values() for head in heads]
        module.load_order(order, shape.heads, place)
        layer.add_module(CODEBOOKS, module)
        return layer

    def _pages(self, count: int) -> tuple[Tensor, Tensor]:
        """Both kinds as vLLM allocates them."""
        numbers = self.layout.page_bytes // self.shape.dtype.itemsize
        return self._views(torch.zeros(count, numbers, dtype=self.shape.dtype))

    def _packed_pages(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Of both layers, as vLLM allocates them where a block has the pages of all layers."""
        numbers = self.layout.page_bytes // self.shape.dtype.itemsize
        storage = torch.zeros(count, len(self.names), numbers, dtype=self.shape.dtype)
        return [self._views(storage[:, at]) for at in range(len(self.names))]

    def _views(self, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Code pages and tail pages in the same memory [pages, numbers of a page]."""
        layout, (count, numbers) = self.layout, pages.shape
        cell = numbers // (layout.num_kv_heads * layout.block_tokens)
        codes = pages.unflatten(1, (layout.num_kv_heads, layout.block_tokens, cell))
        tail = pages.as_strided(
            (count, layout.num_kv_heads, layout.tail_tokens, 2 * layout.head_dim),
            (pages.stride(0), layout.tail_tokens * 2 * layout.head_dim, 2 * layout.head_dim, 1),
        )
        return codes, tail

    def _table(self, group: int, num_requests: int) -> tuple[Tensor, Tensor]:
        """Block table and, for every position of every request, its slot: pages of their own as far as there are."""
        table, size = self.tables[group].get_device_tensor(num_requests), self.page_tokens[group]
        first = self.num_code_pages if group else 0
        pages = torch.arange(first, first + table.numel(), dtype=torch.int32).view(table.shape)
        table.copy_(pages % (self.num_pages - 1) + 1)
        offset = torch.arange(size)
        return table, (table.long()[:, :, None] * size + offset).flatten(1)

    def commons(self, requests: list[Request]) -> list[Any]:
        """What vLLM gives the builder of codes and that of tails for a step."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        new = torch.tensor([count for count, _ in requests])
        starts = torch.cat([torch.zeros(1, dtype=torch.long), new.cumsum(0)]).int()
        lengths = torch.tensor([sum(request) for request in requests], dtype=torch.int32)
        found = []
        for group in range(2):
            table, slots = self._table(group, len(requests))
            rows = [row[done : done + new] for row, (new, done) in zip(slots, requests, strict=True)]
            found.append(
                CommonAttentionMetadata(
                    query_start_loc=starts,
                    query_start_loc_cpu=starts,
                    seq_lens=lengths,
                    num_reqs=len(requests),
                    num_actual_tokens=int(starts[-1]),
                    max_query_len=int(new.max()),
                    max_seq_len=int(lengths.max()),
                    block_table_tensor=table,
                    slot_mapping=torch.cat(rows),
                    seq_lens_cpu_upper_bound=lengths,
                )
            )
        return found

    def step(self, requests: list[Request], seed: int = 0) -> Tensor:
        """Run a step of both layers, those that decode first in the batch; what the last one answers.

        Args:
            requests: those in the batch; they keep their row in the tables.
            seed: of queries, keys and values.
        """
        from vllm.forward_context import set_forward_context

        total, shape, metadata = sum(new for new, _ in requests), self.shape, {}
        for builder, common in zip((self.codes, self.tail), self.commons(requests), strict=True):
            metadata |= dict.fromkeys(builder.layer_names, builder.build(0, common))
        width = shape.heads + 2 * shape.kv_heads
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(total, width * shape.head_dim, generator=generator).to(shape.dtype)
        heads = (shape.heads, shape.kv_heads, shape.kv_heads)
        batch = [
            part.view(total, -1, shape.head_dim) for part in rows.split([shape.head_dim * count for count in heads], 1)
        ]
        output = torch.empty(total, shape.heads, shape.head_dim, dtype=shape.dtype)
        with set_forward_context(metadata, self.config):
            for name in self.names:
                layer = self.layers[name]
                layer.impl.forward(layer, *batch, layer.kv_cache, metadata[name], output)
        return output


def _launched(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], backend: Any) -> tuple[str, str]:
    """A kernel in Triton, and what is compiled for these arguments."""
    from triton.runtime.jit import JITFunction, create_function_from_signature

    if not isinstance(kernel, JITFunction):  # of the interpreter, where tests of kernels have run before
        kernel = JITFunction(kernel.fn, **kernel.kwargs)
    _, specialised, options = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
    return kernel.fn.__name__, f"{specialised} {options}"


@contextlib.contextmanager
def recorded(shape: Shape) -> Iterator[set[tuple[str, str]]]:
    """Pretend that tensors are on a GPU; collects the kernels that are launched meanwhile and for what compiled."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    from vllm_lexico.serve import block_attention, impl

    found: set[tuple[str, str]] = set()
    backend = CUDABackend(GPUTarget("cuda", 90, 32))

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.add(_launched(kernel, args, kwargs, backend))

    def compiled(files: Any, name: str, device: int, shared_bytes: int = 0, **macros: int) -> Any:
        found.add((name, f"{files} {shared_bytes} {macros}"))
        return SimpleNamespace(launch=lambda *_, **__: None)

    def attended(query: Tensor, *_: Any, out: Tensor | None = None, **__: Any) -> tuple[Tensor, Tensor]:
        out = torch.empty_like(query) if out is None else out
        return out, query.new_empty(query.shape[1::-1], dtype=torch.float32)

    caches = (lookup.kernel_for, lookup.bins_kernel_for, clusters._kernel, entry_order.kernel_for)
    with pytest.MonkeyPatch.context() as patch:
        for kind in (JITFunction, InterpretedFunction):
            patch.setattr(kind, "run", run)
        patch.setattr(ops, "on_cuda", lambda _: True)
        patch.setattr(nvrtc, "kernel", compiled)
        patch.setattr(nvrtc, "available", lambda _: shape.cuda_cpp)
        patch.setattr(clusters, "_on_device", lambda _: shape.clusters and shape.cuda_cpp)
        patch.setattr(lookup, "shared_limit_bytes", lambda _: 232448)
        for module in (lookup, write_tail):
            patch.setattr(module, "overlap_on", lambda _: OVERLAP)
        for module in (impl, block_attention):
            patch.setattr(module, "dense_attention", attended)
            patch.setattr(module, "merge_into", lambda *_: None)
        patch.setattr(block_attention, "paged_attention", attended)
        for each in caches:
            each.cache_clear()
        try:
            yield found
        finally:
            for each in caches:
                each.cache_clear()
