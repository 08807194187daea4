"""The tail's pages in a block pool of vLLM's own, for tests of who holds them."""

from typing import Any

import torch
from vllm.v1.core.block_pool import BlockPool

from vllm_lexico.serve.tail_pages import LexicoTailManager, LexicoTailSpec

TAIL, WINDOW, BLOCK = 16, 128, 128  # tokens of a page, of the window, of a page of codes


def make_spec(*, tail: int = TAIL, window_hits: bool = False, **changes: Any) -> LexicoTailSpec:
    """A cache spec with a sink page and one step at once, where nothing else is said."""
    settings = {"sink_blocks": 1, "concurrent_batches": 1, "hit_margin_tokens": BLOCK if window_hits else 0} | changes
    shape = {"num_kv_heads": 2, "head_size": 64, "dtype": torch.bfloat16}
    return LexicoTailSpec(block_size=tail, sliding_window=WINDOW + 1, **shape, **settings)


def make_manager(pool_pages: int, **spec: Any) -> tuple[LexicoTailManager, BlockPool, LexicoTailSpec]:
    """A manager of such pages, its pool and its spec. spec: see `make_spec`."""
    made = make_spec(**spec)
    pool = BlockPool(num_gpu_blocks=pool_pages, enable_caching=True, hash_block_size=made.block_size)
    manager = LexicoTailManager(
        made,
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=0,
        scheduler_block_size=BLOCK,
        max_admission_blocks_per_request=made.max_admission_blocks_per_request(8192, 32768),
    )
    return manager, pool, made
