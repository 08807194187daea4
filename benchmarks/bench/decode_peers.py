"""Attention of a decode step as vLLM's own backends do it, over the same keys and values, for `decode.py`.

A peer is made from dense K and V and gives a call for the clock and a call for its result. Each raises where this vLLM
or this GPU cannot run it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_SPLITS = 32  # vLLM's flash_attn_max_num_splits_for_cuda_graph


@dataclass(frozen=True)
class Dense:
    """A decode step over dense history.

    Attributes:
        query: bf16 [B, Hq, D].
        key, value: bf16 [B, context, Hk, D].
        scale: of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float

    @property
    def lengths(self) -> Tensor:
        """int32 [B]."""
        batch, context = self.key.shape[:2]
        return torch.full((batch,), context, dtype=torch.int32, device=self.key.device)


def paged(dense: Dense, block_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """vLLM's cache [blocks, Hk, block_tokens, 2 D], K beside V, its blocks shuffled, and the block table."""
    batch, context, heads, dim = dense.key.shape
    blocks = -(-context // block_tokens)
    table = torch.randperm(batch * blocks, device=dense.key.device).int().view(batch, blocks)
    cache = torch.zeros(batch * blocks, heads, block_tokens, 2 * dim, dtype=dtype, device=dense.key.device)
    for b in range(batch):
        for half, tokens in enumerate((dense.key[b], dense.value[b])):
            padded = torch.nn.functional.pad(tokens, (0, 0, 0, 0, 0, blocks * block_tokens - context)).to(dtype)
            pages = padded.view(blocks, block_tokens, heads, dim).transpose(1, 2)
            cache[table[b].long(), :, :, half * dim : (half + 1) * dim] = pages
    return cache, table


def flash_attention(dense: Dense, *, fp8: bool = False, block_tokens: int = 16) -> Callable[[], Tensor]:
    """FlashAttention over bf16 or fp8 pages, with the schedule that vLLM's backend makes once a step."""
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_flash_attn_version,
        get_scheduler_metadata,
    )

    (batch, heads, dim), (_, context, kv_heads, _) = dense.query.shape, dense.key.shape
    dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
    cache, table = paged(dense, block_tokens, dtype)
    key, value = cache.transpose(1, 2).split(dim, dim=-1)
    query, lengths = dense.query.to(dtype), dense.lengths
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    one = torch.ones(batch, kv_heads, device=query.device)
    scales = {"q_descale": one, "k_descale": one, "v_descale": one} if fp8 else {}
    schedule = get_scheduler_metadata(
        batch_size=batch,
        max_seqlen_q=1,
        max_seqlen_k=context,
        num_heads_q=heads,
        num_heads_kv=kv_heads,
        headdim=dim,
        cache_seqlens=lengths,
        qkv_dtype=dtype,
        cu_seqlens_q=starts,
        page_size=block_tokens,
        causal=True,
        num_splits=MAX_SPLITS,
    )
    out, version = torch.empty_like(dense.query), get_flash_attn_version()

    def call() -> Tensor:
        flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=context,
            softmax_scale=dense.scale,
            causal=True,
            block_table=table,
            scheduler_metadata=schedule,
            num_splits=MAX_SPLITS,
            fa_version=version,
            **scales,
        )
        return out

    return call


def turboquant(dense: Dense, *, block_tokens: int = 16) -> Callable[[], Tensor]:
    """vLLM's TurboQuant at 3 bits, its own kernels to store and to decode."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.backends.turboquant_attn import _build_hadamard
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention
    from vllm.v1.attention.ops.triton_turboquant_store import triton_turboquant_store

    batch, context, heads, dim = dense.key.shape
    device = dense.key.device
    config = TurboQuantConfig.from_cache_dtype("turboquant_3bit_nc", dim)
    rotation = _build_hadamard(dim, str(device))
    centroids = get_centroids(dim, config.centroid_bits).to(device=device, dtype=torch.float32)
    ordered = centroids.sort().values
    midpoints = (ordered[:-1] + ordered[1:]) / 2
    blocks = -(-context // block_tokens)
    table = torch.randperm(batch * blocks, device=device).int().view(batch, blocks)
    cache = torch.zeros(batch * blocks, block_tokens, heads, config.slot_size_aligned, dtype=torch.uint8, device=device)
    positions = torch.arange(context, device=device)
    for b in range(batch):
        slots = table[b, positions // block_tokens].long() * block_tokens + positions % block_tokens
        triton_turboquant_store(
            dense.key[b],
            dense.value[b],
            cache,
            slots,
            rotation,
            midpoints,
            mse_bits=config.key_mse_bits,
            key_packed_size=config.key_packed_size,
            value_quant_bits=config.effective_value_quant_bits,
            key_fp8=config.key_fp8,
        )
    lengths = dense.lengths

    def call() -> Tensor:
        return triton_turboquant_decode_attention(
            query=dense.query,
            kv_cache=cache,
            block_table=table,
            seq_lens=lengths,
            Pi=rotation,
            centroids=centroids,
            scale=dense.scale,
            mse_bits=config.key_mse_bits,
            key_packed_size=config.key_packed_size,
            value_quant_bits=config.effective_value_quant_bits,
            key_fp8=config.key_fp8,
            norm_correction=config.norm_correction,
            PiT=rotation,
            max_num_kv_splits=MAX_SPLITS,
        )

    return call
