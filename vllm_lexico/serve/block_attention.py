"""Attention of the requests in prefill where answers are the same cold and after a prefix-cache hit: see block_plan."""

from __future__ import annotations

import dataclasses

import torch
from lexico_kernels import RequestTables
from torch import Tensor

from vllm_lexico.serve.block_plan import BlockPlan, RawTile
from vllm_lexico.serve.dense_attention import dense_attention, merge_into, paged_attention
from vllm_lexico.serve.layer_parts import LayerParts


def attend_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: LayerParts,
    tables: RequestTables,
    plan: BlockPlan,
    *,
    scale: float,
    out: Tensor,
    soft_cap: float = 0.0,
) -> Tensor:
    """Attend a step's tokens in prefill, once they are in tail pages and coded.

    Args:
        query: [T, Hq, D] of the tokens in prefill.
        key, value: [T, Hk, D] of the same.
        cache: the layer's pages.
        tables: where the requests' tokens live; raw from where the first piece of each chunk reads raw.
        plan: of the step.
        scale: factor of the scores.
        out: [T, Hq, D], filled.
        soft_cap: of the scores, see `dense_attention`.

    Returns:
        The log-sum-exp, float32 [Hq, T].
    """
    most = max((len(tile.key_row) for tile in plan.raw), default=0)
    most = max(most, max((len(tile.token_request) for tile in plan.coded), default=0))
    workspace = query.new_empty((2, most, *key.shape[1:]))
    lse = query.new_empty(query.shape[1::-1], dtype=torch.float32)
    for tile in plan.raw:
        keys, values = workspace[:, : len(tile.key_row)]
        _gather(key, value, cache, tables, tile, keys, values)
        batch = query[tile.rows], keys, values, tile.queries, tile.keys
        _, lse[:, tile.rows] = dense_attention(*batch, scale=scale, causal=True, soft_cap=soft_cap, out=out[tile.rows])
    coded = dataclasses.replace(tables, raw_start=plan.all_coded)
    for part in plan.coded:
        keys, values = workspace[:, : len(part.token_request)]
        cache.reconstruct(coded, part.token_request, part.token_position, keys, values)
        seen = paged_attention(query[part.rows], keys, values, part.queries, part.keys, scale=scale, soft_cap=soft_cap)
        merge_into(out[part.rows], lse[:, part.rows], *seen)
    return lse


def _gather(
    key: Tensor,
    value: Tensor,
    cache: LayerParts,
    tables: RequestTables,
    tile: RawTile,
    keys: Tensor,
    values: Tensor,
) -> None:
    """Copy a tile's raw keys and values: from the batch, and from tail pages what came before the chunks."""
    for source, target in ((key, keys), (value, values)):
        torch.index_select(source, 0, tile.key_row, out=target)
    if len(tile.place):
        before = keys.new_empty((2, len(tile.place), *keys.shape[1:]))
        cache.reconstruct(tables, tile.token_request, tile.token_position, before[0], before[1])
        keys.index_copy_(0, tile.place, before[0])
        values.index_copy_(0, tile.place, before[1])
