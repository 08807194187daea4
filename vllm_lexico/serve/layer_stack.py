"""Steps of decode code the tokens of all layers in one launch, when the last layer has stored its own.

Where sparsities differ, the heads of one sparsity in all layers share a launch.

A launch that codes little takes as long as one that codes much, so one for all layers costs a step less, and nearly
nothing where no token is to be coded. Nothing of a step reads what the step codes: its tokens are in the window of
their own request, raw, and no other request of the step has hit their block (`tail.py`). All layers of a builder run in
every step; layers of drafts, which do not, have builders of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lexico_kernels import LayerStack

from vllm_lexico.serve.layer_parts import stacked


@dataclass
class LayersOfStep:
    """The layers that share a step's metadata, in whatever order the step runs them.

    stacks: what each launch codes.
    num_layers: that share them.
    stored: layers that have stored the step's tokens; 0 again after the last, since metadata may serve several runs.
    """

    stacks: tuple[LayerStack, ...]
    num_layers: int
    stored: int = 0

    def count_stored(self) -> bool:
        """Count one more layer that has stored the step's tokens; True for the last, which codes for all."""
        self.stored = (self.stored + 1) % self.num_layers
        return self.stored == 0


class LayerFinder:
    """Stacks the layers of a metadata builder, anew when vLLM has given them other pages."""

    def __init__(self, layer_names: Sequence[str], vllm_config: Any) -> None:
        self._names = layer_names
        self._layers = vllm_config.compilation_config.static_forward_context
        self._bound_to = (0, 0, 0)  # what layers without pages say
        self._stacks: tuple[LayerStack, ...] = ()
        self._last: LayersOfStep | None = None

    def of_step(self, layout: Any) -> LayersOfStep | None:
        """For one step; None where each layer has to code by itself. Not for calls under capture of a CUDA graph."""
        assert self._last is None or self._last.stored == 0, "a step ended before all of its layers had run"
        first = self._layers[self._names[0]]
        bound_to = first.impl.page_addresses(first.kv_cache)
        if bound_to != self._bound_to:  # vLLM gives all layers their pages at once
            layers = [self._layers[name] for name in self._names]
            parts = [layer.impl.bind(layer, layer.kv_cache, layout) for layer in layers]
            self._stacks = stacked([cache for own in parts for cache in own.caches_to_stack()])
            self._bound_to = bound_to
        self._last = LayersOfStep(self._stacks, len(self._names)) if self._stacks else None
        return self._last
