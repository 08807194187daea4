"""What a request holds in the cache when it ends, from the product's own page manager and no engine."""

from __future__ import annotations

import torch
from lexico_kernels.memory.layout import KV

from vllm_lexico.config import LexicoConfig, Sparsity
from vllm_lexico.dictionary.fingerprint import ModelFingerprint

PLAIN_BYTES = 2  # of a number in bf16
BLOCKS = (64, 128)  # vLLM's block sizes
REQUEST_TOKENS = 1024


def held_bytes(
    shape: ModelFingerprint, sparsity: tuple[int, int], window: int, sinks: int, block_tokens: int, tokens: int
) -> int:
    """Bytes a layer of a finished request: its code pages and the tail pages that the manager has left it.

    shape: of the model, on one rank, served in bf16. sparsity: of keys and values. window, sinks: the settings of these
    names. block_tokens: vLLM's block size. tokens: computed ones, nearly all of them the prompt, in one chunk.
    ValueError where vLLM is missing, or as `LexicoConfig`.
    """
    try:
        from vllm.v1.core.block_pool import BlockPool

        from vllm_lexico.serve.setup import LexicoSetup
        from vllm_lexico.serve.tail_pages import LexicoTailManager, tail_spec
    except ImportError as error:
        raise ValueError(
            f"vLLM's block pool tells what a tail holds, and vLLM is not here ({error}); install it, or leave out what "
            f"asks for it"
        ) from error
    config = LexicoConfig(sparsity=Sparsity(*sparsity), window=window, sinks=sinks)
    setup = LexicoSetup(config, None, num_draft_tokens=0, concurrent_batches=2)
    layout = setup.layout(shape.head_dim, shape.num_kv_heads, block_tokens, torch.bfloat16)
    spec = tail_spec(setup, layout, torch.bfloat16)
    assert spec.page_size_bytes == layout.page_bytes, "pages of both kinds have one size"
    prompt = max(1, tokens - 2 * block_tokens)  # then enough steps of one token for the window to move by blocks
    pool = BlockPool(2 + tokens // layout.tail_tokens, enable_caching=False, hash_block_size=layout.tail_tokens)
    manager = LexicoTailManager(
        spec,
        block_pool=pool,
        enable_caching=False,
        kv_cache_group_id=0,
        scheduler_block_size=block_tokens,
        max_admission_blocks_per_request=spec.max_admission_blocks_per_request(prompt, tokens),
    )
    for computed in (0, *range(prompt, tokens)):
        manager.remove_skipped_blocks("request", computed)
        ends = computed + (1 if computed else prompt)
        manager.allocate_new_blocks("request", ends, ends)
    tail_pages = sum(not block.is_null for block in manager.req_to_blocks["request"])
    return (-(-tokens // block_tokens) + tail_pages) * layout.page_bytes


def plain_bytes(shape: ModelFingerprint, tokens: int) -> int:
    """Bytes a layer of as many tokens in bf16."""
    return len(KV) * shape.num_kv_heads * shape.head_dim * PLAIN_BYTES * tokens
