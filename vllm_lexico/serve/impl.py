"""Attention of one layer: write the step's tokens, then read codes and tail."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from lexico_kernels import CodeLayout, LayerCache, RequestTables, ops
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_lexico import compat, last_word
from vllm_lexico.compat import drafts as compat_drafts
from vllm_lexico.compat import layers as compat_layers
from vllm_lexico.serve import draft_layers, other_layers, refusals, start_line, warm_up
from vllm_lexico.serve.block_attention import attend_blocks
from vllm_lexico.serve.block_plan import BlockPlan
from vllm_lexico.serve.codebooks import LayerCodebooks, layer_books
from vllm_lexico.serve.dense_attention import dense_attention, merge_into, scratch_bytes
from vllm_lexico.serve.later_coding import Waiting, most_later_tokens
from vllm_lexico.serve.layer_parts import LayerParts, code_pages, raw_pages
from vllm_lexico.serve.metadata import (
    LexicoMetadata,
    LexicoMetadataBuilder,
    LexicoTailMetadata,
    LexicoTailMetadataBuilder,
)
from vllm_lexico.serve.prefill_plan import PrefillPlan, history_tokens
from vllm_lexico.serve.setup import LexicoSetup
from vllm_lexico.serve.tail_layer import add_tail_layer
from vllm_lexico.serve.tail_pages import LexicoTailManager, LexicoTailSpec
from vllm_lexico.serve.uneven_pages import PagesOfLayer, own_pages
from vllm_lexico.serve.wiring import allocation
from vllm_lexico.serve.wiring.layers import check_layers
from vllm_lexico.serve.wiring.pages import check_pages

CODEBOOKS = "lexico_codebooks"  # the attention layer's submodule that holds them


class LexicoImpl(AttentionImpl[LexicoMetadata]):
    """Attention over codes and tail for one layer."""

    @last_word.kept()
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        check_layers(LexicoImpl, LexicoMetadataBuilder, LexicoTailMetadataBuilder)
        check_pages(LexicoTailManager, LexicoTailSpec)
        self.vllm_config = get_current_vllm_config()
        refusals.refuse(
            refusals.layer_refusals(
                max_model_len=self.vllm_config.model_config.max_model_len,
                alibi_slopes=alibi_slopes,
                sliding_window=sliding_window,
                attn_type=attn_type,
                kv_sharing_target=kv_sharing_target_layer_name,
            )
        )
        compat.warn_of_untested_version()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads = num_kv_heads or num_heads
        self.soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks  # the layer's parameter, [Hq]; its numbers come with the weights
        refusals.refuse(refusals.engine_refusals(self.vllm_config))
        self.setup = LexicoSetup.of(self.vllm_config)
        self.tail_name = ""
        self.layer_index: int | None = None  # of the model; known once weights are loaded
        self._cache: LayerParts | None = None
        self._later: Tensor | None = None
        self._bound_to: tuple[int, int, int] = (0, 0, 0)

    @last_word.kept()
    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Put the shadow layer beside this one and load its codebooks; harmless when called again.

        Args:
            act_dtype: the model's dtype, that of the atoms.
        """
        layers = self.vllm_config.compilation_config.static_forward_context
        name, layer = next((name, layer) for name, layer in layers.items() if getattr(layer, "impl", None) is self)
        refusals.refuse(refusals.attention_class_refusals(type(layer), Attention, name))
        refusals.refuse(refusals.value_size_refusals(layer.head_size, layer.head_size_v, name))
        layer.attn_backend = layer.attn_backend.bound_to(self.setup)
        allocation.check_backend_taken(layer, name, layer.attn_backend)
        index = self._take_index(name, layers)
        layer.sliding_window = None  # one that binds was refused, and any makes vLLM give the layer a window's pages
        self.tail_name = add_tail_layer(name, layer, self.setup, layers)
        other_layers.share_pages(layers, layers[self.tail_name])
        if self.setup.lookahead_tokens:
            compat_drafts.let_drafts_choose(draft_layers.keep_raw)
        if self.setup.beside_states:
            compat_layers.prepare_kernels_of_states(self.vllm_config, layers)
        if hasattr(layer, CODEBOOKS):
            start_line.log_new_weights(self.setup)
        else:
            layer.add_module(CODEBOOKS, LayerCodebooks())
        device = torch.device(current_platform.device_type)
        parts = layer_books(
            self.setup,
            index,
            head_size=self.head_size,
            num_kv_heads=self.num_kv_heads,
            total_kv_heads=self.vllm_config.model_config.get_total_num_kv_heads(),
            device=device,
            dtype=act_dtype,
        )
        for part, (_, books) in enumerate(parts):
            getattr(layer, CODEBOOKS).load(books, part)
        order = [head for heads, _ in parts for head in heads]
        getattr(layer, CODEBOOKS).load_order(order, self.num_heads, device)
        warm_up.register(self._to_warm_up(layer))

    def _to_warm_up(self, layer: Any) -> Callable[[], warm_up.Layer | None]:
        """For `warm_up.register`."""

        def bind() -> warm_up.Layer | None:
            shadow = self.vllm_config.compilation_config.static_forward_context[self.tail_name]
            if not all(self.page_addresses(layer.kv_cache)):
                return None
            cache = self.bind(layer, layer.kv_cache, shadow.layout(self.vllm_config))
            tables = warm_up.tables_of_nothing(cache.whole, self.vllm_config.model_config.max_model_len)
            return warm_up.Layer(self, cache, tables)

        return bind

    def _take_index(self, name: str, layers: dict[str, Any]) -> int:
        """Remember which of the model's layers this is; its dictionary is that of no other."""
        impls = {other: getattr(layer, "impl", None) for other, layer in layers.items()}
        taken = {one.layer_index: other for other, one in impls.items() if isinstance(one, LexicoImpl)}
        self.layer_index = index = extract_layer_index(name)
        allocation.check_layer_index(index, name, taken)
        return index

    def forward(
        self,
        layer: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: LexicoMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend one step.

        Args:
            query: [T, Hq, D]; key, value: [T, Hk, D], keys after RoPE.
            kv_cache: the layer's code pages as vLLM allocated them.
            attn_metadata: None while vLLM measures memory; then the step's peak is only reserved.
            output: [T, Hq, D], filled and returned.
        """
        if attn_metadata is None:
            self._reserve(query)
            return output.fill_(0)
        step, tail = attn_metadata, self._tail_metadata()
        cache, rows = self.bind(layer, kv_cache, step.layout), slice(0, attn_metadata.num_tokens)
        batch, attended = (query[rows], key[rows], value[rows]), output
        if cache.order is not None:
            batch = cache.order.batch(*batch)
            attended = torch.empty_like(batch[0])
        self._store(layer, *batch[1:], cache, step, tail)
        self._attend(*batch, cache, step, tail, attended)
        if cache.order is not None:
            output[rows].index_copy_(1, cache.order.heads, attended)
        return output

    def _store(
        self, layer: Any, key: Tensor, value: Tensor, cache: LayerParts, step: LexicoMetadata, tail: LexicoTailMetadata
    ) -> None:
        """Write a step's tokens [T, Hk, D], and code those that are due or have them coded."""
        cache.write_tail(key, value, tail.slot_mapping[: step.num_tokens])
        entries, relative_error = (tail.source, step.destination), self.setup.config.relative_error
        if step.later is not None:
            step.later.keep(self._kept(key, value, cache, entries), lambda: self._has(layer, cache))
        elif step.layers is None:
            cache.omp_encode(key, value, *entries, relative_error=relative_error)
        elif step.layers.count_stored():
            for stack in step.layers.stacks:
                ops.omp_encode_layers(stack, *entries, relative_error=relative_error)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: LayerParts,
        step: LexicoMetadata,
        tail: LexicoTailMetadata,
        output: Tensor,
    ) -> None:
        """Attention of a step's tokens, those that decode first; heads as the layer's parts have them."""
        tables = RequestTables(step.block_table, tail.block_table, tail.sink_end, tail.raw_start)
        if step.num_decode_tokens:
            rows = slice(0, step.num_decode_tokens)
            self.attend_decode(
                query[rows], cache, tables, step.token_request[rows], step.token_seq_len[rows], output[rows]
            )
        if step.prefill is not None:
            rows = slice(step.num_decode_tokens, step.num_decode_tokens + step.prefill.num_tokens)
            self.attend_prefill(query[rows], key[rows], value[rows], cache, tables, step.prefill, output[rows])

    def attend_decode(
        self,
        query: Tensor,
        cache: LayerParts,
        tables: RequestTables,
        token_request: Tensor,
        token_seq_len: Tensor,
        output: Tensor,
    ) -> None:
        """Attention of single tokens, as `ops.sparse_decode`; with learned sinks."""
        step, sinks = (query, tables, token_request, token_seq_len), self._sinks_of(cache)
        cache.sparse_decode(*step, scale=self.scale, soft_cap=self.soft_cap, sinks=sinks, out=output)

    def _sinks_of(self, cache: LayerParts) -> Tensor | None:
        """The learned sinks in the order in which the layer's parts have their heads."""
        if self.sinks is None or cache.order is None:
            return self.sinks
        return self.sinks.index_select(0, cache.order.heads)

    def _kept(self, key: Tensor, value: Tensor, cache: LayerParts, entries: tuple[Tensor, Tensor]) -> Waiting:
        """Copies of a step's keys and values, which the next step codes."""
        kept_key, kept_value = self._later_buffer(key)[:, : len(key)]
        kept_key.copy_(key)
        kept_value.copy_(value)
        return Waiting(kept_key, kept_value, cache, *entries)

    def _has(self, layer: Any, cache: LayerParts) -> bool:
        """Whether the layer's pages are still those of a cache that `bind` gave."""
        return self._cache is cache and self._bound_to == self.page_addresses(layer.kv_cache)

    def _later_buffer(self, like: Tensor) -> Tensor:
        """Memory of the engine's life for keys and values that wait, [2, most of a step, Hk, D]."""
        if self._later is None:
            most = most_later_tokens(self.setup, self.vllm_config)
            self._later = like.new_empty((2, most, self.num_kv_heads, self.head_size))
        return self._later

    def attend_prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: LayerParts,
        tables: RequestTables,
        plan: PrefillPlan | BlockPlan,
        output: Tensor,
    ) -> None:
        """Attention of the requests in prefill.

        Args:
            query: [T, Hq, D] of the tokens in prefill.
            key, value: [T, Hk, D] of the same.
            cache: the layer's pages.
            tables: where the requests' tokens live.
            plan: of the step.
            output: [T, Hq, D], filled.
        """
        batch = query, key, value, cache, tables
        if isinstance(plan, BlockPlan):
            lse = attend_blocks(*batch, plan, scale=self.scale, soft_cap=self.soft_cap, out=output)
        else:
            lse = self._attend_chunks(*batch, plan, output)
        self._weigh_against_sinks(output, lse.T, cache)

    def _weigh_against_sinks(self, output: Tensor, lse: Tensor, cache: LayerParts) -> None:
        """Give each head's learned sink its share of the weight: a score like a token's whose value is nothing.

        Args:
            output: [T, Hq, D], over all tokens; scaled in place.
            lse: float32 [T, Hq], natural log-sum-exp of the scores.
            cache: the layer's, whose order the heads are in.
        """
        sinks = self._sinks_of(cache)
        if sinks is not None:
            output.mul_((lse - sinks).sigmoid_()[..., None])

    def _attend_chunks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: LayerParts,
        tables: RequestTables,
        prefill: PrefillPlan,
        output: Tensor,
    ) -> Tensor:
        """Attention of the requests in prefill: raw within the chunk, codes and tail for what came before.

        Returns the log-sum-exp, float32 [Hq, T].
        """
        chunks = prefill.chunks
        attend = functools.partial(dense_attention, scale=self.scale, soft_cap=self.soft_cap)
        _, lse = attend(query, key, value, chunks, chunks, causal=True, out=output)
        for tile in prefill.tiles:
            keys, values = self._workspace(query)[:, : len(tile.token_request)]
            cache.reconstruct(tables, tile.token_request, tile.token_position, keys, values)
            seen = attend(query[tile.rows], keys, values, tile.queries, tile.keys, causal=False)
            merge_into(output[tile.rows], lse[:, tile.rows], *seen)
        return lse

    def _workspace(self, query: Tensor) -> Tensor:
        tokens = history_tokens(self.num_kv_heads, self.head_size, query.dtype)
        return query.new_empty((2, tokens, self.num_kv_heads, self.head_size))

    def _reserve(self, query: Tensor) -> None:
        """Take and return what a step may need, so that memory profiling sees its peak; take what stays."""
        if self.setup.later_tokens:
            self._later_buffer(query)
        block_tokens, max_tokens = self.vllm_config.cache_config.block_size, self.vllm_config.model_config.max_model_len
        layout = self.setup.layout(self.head_size, self.num_kv_heads, block_tokens, query.dtype)
        parts = self.setup.part_layouts(layout, self.layer_index or 0)
        copies = [query.new_empty((4, *query.shape))] if len(parts) > 1 else []  # of the batch in another order
        tile = torch.empty_like(query)
        lse = [query.new_empty(query.shape[:2], dtype=torch.float32) for _ in range(4)]  # two, merged, made contiguous
        history = [self._workspace(query)]
        if self.setup.same_answers:  # a tile, and of its keys those that come from tail pages
            most = self.setup.reach(layout).most_tokens(history[0].shape[1])
            history = [query.new_empty((2, most, *history[0].shape[2:])) for _ in range(2)]
        history.append(query.new_empty(scratch_bytes(query), dtype=torch.uint8))
        del tile, lse, history
        decode_tokens = self.vllm_config.scheduler_config.max_num_seqs * (1 + self.setup.num_draft_tokens)
        group, num_decodes = self.num_heads // self.num_kv_heads, min(query.shape[0], decode_tokens)
        most = max_tokens + block_tokens
        scratch = max(ops.decode_scratch_bytes(own, num_decodes, group * own.num_kv_heads, most) for own in parts)
        copies.append(query.new_empty(scratch, dtype=torch.uint8))

    def _tail_metadata(self) -> LexicoTailMetadata:
        by_layer = get_forward_context().attn_metadata
        return (by_layer[0] if isinstance(by_layer, list) else by_layer)[self.tail_name]

    def page_addresses(self, kv_cache: Tensor) -> tuple[int, int, int]:
        """Where the pages of both kinds start and how many there are; 0 as long as vLLM has not allocated them.

        How many, since vLLM tries CUDA graphs with a few pages first, and those that stay may start at the same place.
        """
        tail_cache = self.vllm_config.compilation_config.static_forward_context[self.tail_name].kv_cache
        return kv_cache.data_ptr(), tail_cache.data_ptr(), kv_cache.shape[0]

    def bind(self, layer: nn.Module, kv_cache: Tensor, layout: CodeLayout) -> LayerParts:
        """View the pages that vLLM allocated; once it has them all they keep their place for the engine's life.

        layout: of a layer with the mean sparsity, where sparsities differ.
        """
        pages = self.page_addresses(kv_cache)
        if self._cache is None or self._bound_to != pages:
            tail_cache = self.vllm_config.compilation_config.static_forward_context[self.tail_name].kv_cache
            given, tail, books = code_pages(kv_cache), raw_pages(tail_cache, layout), getattr(layer, CODEBOOKS)
            group = self.num_heads // self.num_kv_heads
            if self.setup.sparsities:
                assert self.layer_index is not None
                own = own_pages(given, self._layers_of_block(layout), self.layer_index)
                layouts = self.setup.part_layouts(layout, self.layer_index)
                self._cache = LayerParts.cut(given, own, tail, books.pairs(), layout, layouts, books.order(), group)
            else:
                pair = books.book("key"), books.book("value")
                self._cache = LayerParts.of(LayerCache(given, tail, *pair, layout, group))
            self._bound_to = pages
        return self._cache

    def _layers_of_block(self, layout: CodeLayout) -> dict[int, PagesOfLayer]:
        """Of every coded layer of this rank, by its index: where vLLM put its pages, and bytes of its own."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        coded = [layer for layer in layers if isinstance(getattr(layer, "impl", None), LexicoImpl)]
        return {
            layer.impl.layer_index: PagesOfLayer(
                code_pages(layer.kv_cache),
                sum(own.page_bytes for own in self.setup.part_layouts(layout, layer.impl.layer_index)),
            )
            for layer in coded
        }
