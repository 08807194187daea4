"""What two engines have to agree on before one reads the other's codes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from lexico_kernels.memory.layout import LAYOUT_VERSION

from vllm_lexico import __version__
from vllm_lexico.dictionary.file import read_checksum
from vllm_lexico.serve.refusals import drafts_have_layers
from vllm_lexico.serve.setup import LexicoSetup

if TYPE_CHECKING:
    from lexico_kernels import CodeLayout

    from vllm_lexico.serve.tail_pages import LexicoTailSpec


def identity(setup: LexicoSetup, layout: CodeLayout, tail: LexicoTailSpec, drafts: str = "no") -> str:
    """One line that is the same for engines whose code pages mean the same.

    It has the number of the pages' layout, and the dictionary's hash in full, so that who reads two of them sees which
    dictionaries they are.

    Args:
        setup: of the engine.
        layout: of a layer's codes on a rank.
        tail: the cache spec of its raw tokens.
        drafts: the method of drafts that have pages beside codes.
    """
    dictionary = "none" if setup.dictionary_path is None else read_checksum(setup.dictionary_path)
    sparsity, uneven = setup.config.sparsity, setup.config.uneven
    by_head = "" if uneven is None else f" ({uneven[0]} or {uneven[1]} by head, {_hash(setup.sparsities)})"
    return (
        f"LEXICO {__version__}, codec {layout.codec} in layout {LAYOUT_VERSION}, "
        f"sparsity {sparsity.key}/{sparsity.value}{by_head}, "
        f"dictionary {dictionary}, blocks of {layout.block_tokens} tokens in {layout.page_bytes} bytes, "
        f"first {tail.sink_blocks * tail.block_size} tokens in pages of {tail.block_size}, {drafts} drafts in blocks"
    )


def _hash(dealt: object) -> str:
    """Short, of which heads have how many atoms."""
    return hashlib.sha256(repr(dealt).encode()).hexdigest()[:8]


def engine_identity(vllm_config: Any, tail: LexicoTailSpec, block_tokens: int) -> str:
    """The same, from what an engine has when its cache is planned.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        tail: the cache spec of the group of tails.
        block_tokens: P, of the group of codes.
    """
    setup = LexicoSetup.of(vllm_config)
    layout = setup.layout(tail.head_size, tail.num_kv_heads, block_tokens, tail.dtype)
    drafts = vllm_config.speculative_config.method if drafts_have_layers(vllm_config) else "no"
    return identity(setup, layout, tail, drafts)
