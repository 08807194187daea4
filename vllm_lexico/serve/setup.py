"""What an engine's configuration means for LEXICO: settings, dictionary, layouts."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lexico_kernels import CodeLayout
from lexico_kernels.memory.layout import KERNEL_CODECS, SPAN_TOKENS
from vllm.platforms import current_platform

from vllm_lexico.config import TRAIN, LexicoConfig, Sparsity
from vllm_lexico.dictionary.coded_layers import coded_layers
from vllm_lexico.dictionary.file import Dictionary, load_dictionary
from vllm_lexico.dictionary.fingerprint import ModelFingerprint
from vllm_lexico.dictionary.first_start import find_or_train
from vllm_lexico.dictionary.search import find_dictionary
from vllm_lexico.dictionary.uneven import uneven_sparsities
from vllm_lexico.serve import refusals
from vllm_lexico.serve.coding_plan import MAX_WAITING_TOKENS, Reach


@dataclass(frozen=True)
class LexicoSetup:
    """Derived from a `VllmConfig`; cheap to derive again.

    config: the user's settings.
    dictionary_path: the model's dictionary; None with the exact codec.
    dictionary_state: of its file when it was found; one that replaces it later is for engines that start later.
    num_draft_tokens: speculative tokens a step may add and take back.
    concurrent_batches: steps that may be under way at once.
    beside_states: of a model that has layers with states too, the layers of a rank that are coded; else 0.
    lookahead_tokens: beyond a step's last one that a model which drafts has pages for; 0 without such a model.
    sparsities: (layer, atoms per vector of each KV head) of this rank's layers where they differ; else ().
    """

    config: LexicoConfig
    dictionary_path: Path | None
    num_draft_tokens: int
    concurrent_batches: int
    beside_states: int = 0
    dictionary_state: tuple[int, ...] = ()
    lookahead_tokens: int = 0
    sparsities: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @classmethod
    def of(cls, vllm_config: Any) -> LexicoSetup:
        """Read the settings and find the dictionary, or train it where they say so; it is checked against the model.

        Raises:
            ValueError: a setting is not allowed, or no dictionary fits the model.
        """
        config = LexicoConfig.from_additional_config(vllm_config.additional_config)
        if config.codec not in KERNEL_CODECS and current_platform.device_type != "cpu":
            raise ValueError(refusals.codec_on_gpu(config.codec))
        path, model, parallel = None, vllm_config.model_config, vllm_config.parallel_config
        state: tuple[int, ...] = ()
        if config.codec != "exact":
            fingerprint = ModelFingerprint.of(model.hf_text_config, model.max_model_len)
            overrides = _overrides(model.hf_overrides)
            path, state = _checked_dictionary(config.dictionary, model.model, fingerprint, overrides)
        beside_states = 0
        if model.is_hybrid:
            beside_states = -(-len(coded_layers(model.hf_text_config)) // parallel.pipeline_parallel_size)
        lookahead_tokens = vllm_config.num_lookahead_tokens if refusals.drafts_have_layers(vllm_config) else 0
        sparsities: tuple[tuple[int, tuple[int, ...]], ...] = ()
        if config.uneven is not None:
            assert path is not None, "the exact codec takes no uneven sparsities"
            refusals.refuse(refusals.uneven_refusals(vllm_config))
            layers, ranks = range(*model.get_layers_start_end_indices(parallel)), parallel.tensor_parallel_size
            own = model.get_total_num_kv_heads(), model.get_num_kv_heads(parallel), parallel.rank % ranks, ranks
            given = _loaded(path, state), layers, heads_of(*own)
            sparsities = uneven_sparsities(*given, config.sparsity.key, *config.uneven)
        drafts, batches = vllm_config.num_speculative_tokens, vllm_config.max_concurrent_batches
        return cls(config, path, drafts, batches, beside_states, state, lookahead_tokens, sparsities)

    @property
    def packs_blocks(self) -> bool:
        """Whether a block of the pool has the pages of all layers, one beside the other, and not of equal bytes."""
        return bool(self.beside_states or self.lookahead_tokens or self.sparsities)

    def layout(self, head_dim: int, num_kv_heads: int, block_tokens: int, dtype: torch.dtype) -> CodeLayout:
        """The code layout of a layer on this rank."""
        sizes = refusals.STATE_BLOCK_SIZES if self.beside_states else (64, *refusals.FITTING_BLOCK_SIZES)
        assert block_tokens in sizes and block_tokens % SPAN_TOKENS == 0, block_tokens
        return CodeLayout(
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            key_sparsity=self.config.sparsity.key,
            value_sparsity=self.config.sparsity.value,
            codec=self.config.codec,
            block_tokens=block_tokens,
            element_bytes=dtype.itemsize,
        )

    def heads_by_sparsity(self, index: int, num_kv_heads: int) -> dict[Sparsity, tuple[int, ...]]:
        """KV heads of one of this rank's layers that have the same atoms per vector, the first head's first."""
        own = dict(self.sparsities).get(index)
        if own is None:
            return {self.config.sparsity: tuple(range(num_kv_heads))}
        return {Sparsity(each, each): tuple(at for at, atoms in enumerate(own) if atoms == each) for each in own}

    def part_layouts(self, layout: CodeLayout, index: int) -> list[CodeLayout]:
        """Of each part of a layer's heads, given that of a layer with the mean sparsity; tail pages are all alike."""
        if not self.sparsities:
            return [layout]
        parts = self.heads_by_sparsity(index, layout.num_kv_heads)
        return [
            replace(
                layout,
                num_kv_heads=len(heads),
                key_sparsity=own.key,
                value_sparsity=own.value,
                raw_tokens=layout.tail_tokens,
            )
            for own, heads in parts.items()
        ]

    @property
    def window_tokens(self) -> int:
        """Full-precision tokens before a step's first: the window, or what may wait to be coded, and drafts."""
        return max(self.config.window, MAX_WAITING_TOKENS) + self.num_draft_tokens

    def sink_blocks(self, layout: CodeLayout) -> int:
        """Tail pages that hold the sinks."""
        return -(-self.config.sinks // layout.tail_tokens)

    @property
    def later_tokens(self) -> int:
        """Most tokens of a step that the next one codes; none beside states, which are copied before a step begins."""
        return 0 if self.beside_states else self.config.coded_later

    @property
    def same_answers(self) -> bool:
        """Whether a request is answered alike cold and after a prefix-cache hit."""
        return self.config.prefix_hits == "same"

    def reach(self, layout: CodeLayout) -> Reach:
        """How far back queries read raw where answers are the same cold and after a hit."""
        sink_end = self.sink_blocks(layout) * layout.tail_tokens
        return Reach(layout.block_tokens, layout.tail_tokens, self.window_tokens, sink_end)

    def tail_reach(self, layout: CodeLayout) -> Reach:
        """The same of a step's first token; counted from its block's start only where answers are the same."""
        reach = self.reach(layout)
        return reach if self.same_answers else reach._replace(block_tokens=1)

    def dictionary(self) -> Dictionary | None:
        """The loaded dictionary; loaded once a process and file."""
        return None if self.dictionary_path is None else _loaded(self.dictionary_path, self.dictionary_state)


def heads_of(total_kv_heads: int, local_kv_heads: int, rank: int, size: int) -> slice:
    """The KV heads of a tensor-parallel rank; where there are more ranks than heads, several hold the same one."""
    first = rank * local_kv_heads if total_kv_heads >= size else rank * total_kv_heads // size
    return slice(first, first + local_kv_heads)


def search_anew() -> None:
    """Let the next engine of this process find dictionaries that were made or replaced since the last one started."""
    _checked_dictionary.cache_clear()


@functools.cache
def _loaded(path: Path, state: tuple[int, ...]) -> Dictionary:
    return load_dictionary(path)


@functools.cache
def _checked_dictionary(
    setting: str | None, model: str, fingerprint: ModelFingerprint, overrides: str | None
) -> tuple[Path, tuple[int, ...]]:
    wanted = model, fingerprint, overrides
    path = find_or_train(*wanted) if setting == TRAIN else find_dictionary(setting, *wanted)
    state = _state(path)
    _loaded(path, state).check(fingerprint, model, overrides)
    return path, state


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is replaced; () where there is none, which loading refuses."""
    try:
        of_file = path.stat()
    except OSError:
        return ()
    return of_file.st_ino, of_file.st_mtime_ns, of_file.st_size


def _overrides(given: Any) -> str | None:
    """What the user overrides in the model's configuration, as `train_command` takes it."""
    try:
        return json.dumps(given, sort_keys=True) if given else ""
    except TypeError:  # a function
        return None
