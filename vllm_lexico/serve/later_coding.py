"""Coding that waits for the next step, so that the first token of a prompt does not wait for the prompt's codes.

With the setting `coded_later` a step with prefill, of up to that many tokens, keeps each layer's K and V instead of
coding them, and the next step codes them before anything else: its metadata builder, which vLLM calls eagerly before
each run of the model, launches what waits. Pages that were given back meanwhile are written before their new owner
writes them, since a step's own writes come after. What makes that right is listed in docs/design/write.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from vllm_lexico.serve.layer_parts import LayerParts

if TYPE_CHECKING:
    from vllm_lexico.serve.setup import LexicoSetup


class Waiting(NamedTuple):
    """A layer's tokens that are to be coded, in the buffers that keep them, and where to."""

    key: Tensor
    value: Tensor
    cache: LayerParts
    source: Tensor
    destination: Tensor


def most_later_tokens(setup: LexicoSetup, vllm_config: Any) -> int:
    """Most tokens of a step that the next one codes; buffers have room for so many."""
    return min(setup.later_tokens, vllm_config.scheduler_config.max_num_batched_tokens)


class LaterCoding:
    """What a builder's layers have left to be coded by the next step.

    Args:
        most_tokens: of a step that may wait, from `most_later_tokens`; 0 for none.
        relative_error: of the coding.
    """

    def __init__(self, most_tokens: int, relative_error: float) -> None:
        self.most_tokens, self._relative_error = most_tokens, relative_error
        self._waiting: list[tuple[Waiting, Callable[[], bool]]] = []

    def keep(self, waiting: Waiting, has_pages: Callable[[], bool]) -> None:
        """Have a layer's tokens coded when the next step begins.

        Args:
            waiting: its tensors must not be overwritten by other than a later step.
            has_pages: says then whether the layer's pages are still these; where not, nothing is coded.
        """
        self._waiting.append((waiting, has_pages))

    def code(self) -> None:
        """Launch what waits."""
        for waiting, has_pages in self._waiting:
            if has_pages():
                batch = waiting.key, waiting.value, waiting.source, waiting.destination
                waiting.cache.omp_encode(*batch, relative_error=self._relative_error)
        self._waiting.clear()
