"""The line at start that says what the cache costs and holds."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lexico_kernels import CodeLayout
    from vllm.v1.kv_cache_interface import AttentionSpec

    from vllm_lexico.serve.setup import LexicoSetup

logger = logging.getLogger("vllm.lexico")


def describe_start(setup: LexicoSetup, layout: CodeLayout, num_layers: int, num_tokens: int) -> str:
    """Codec, dictionary, bytes per token compared with 16 bits, and tokens that fit, in one line.

    Args:
        num_layers: attention layers of this rank.
        num_tokens: tokens that the cache holds in requests of the longest length, as vLLM counts them.
    """
    sparsity, dictionary = setup.config.sparsity, setup.dictionary()
    atoms = (
        f"sparsity {sparsity.key}" if sparsity.key == sparsity.value else f"sparsity {sparsity.key}/{sparsity.value}"
    )
    what = f"{layout.codec}, {atoms}" if dictionary else "the exact codec (for tests)"
    source = (
        f", dictionary {dictionary.info.model_name} ({dictionary.info.atoms} atoms, {setup.dictionary_path})"
        if dictionary
        else ""
    )
    num_heads = layout.num_kv_heads * num_layers
    return (
        f"LEXICO: {what}{source}; {layout.cell_bytes * num_heads:,} bytes per token instead of "
        f"{layout.raw_token_bytes * num_heads:,} ({layout.ratio:.2%}), newest {setup.window_tokens} and first "
        f"{setup.sink_blocks(layout) * layout.tail_tokens} tokens exact; {num_tokens:,} tokens fit"
    )


def log_start(setup: LexicoSetup, layout: CodeLayout, spec: AttentionSpec, vllm_config: Any, layers: list[str]) -> None:
    """Log `describe_start` on the first rank.

    Args:
        spec: cache spec of the codes group.
        layers: names of its layers.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    from vllm_lexico.serve.tail_pages import tail_spec

    if get_tensor_model_parallel_rank() != 0:
        return
    max_model_len = vllm_config.model_config.max_model_len
    tail = tail_spec(setup, layout, spec.dtype)
    tail_blocks = tail.max_admission_blocks_per_request(vllm_config.max_in_flight_tokens, max_model_len)
    blocks_per_request = -(-max_model_len // spec.block_size) + tail_blocks
    num_blocks = vllm_config.compilation_config.static_forward_context[layers[0]].kv_cache.shape[0]
    logger.info(describe_start(setup, layout, len(layers), num_blocks * max_model_len // blocks_per_request))
