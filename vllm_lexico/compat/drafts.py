"""Workarounds for models that draft, which vLLM builds after the model and in the model's configuration."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from vllm_lexico import NAME, compat

# Who loads a model that drafts: the V2 runner's and the V1 runner's.
LOADERS = (
    ("vllm.v1.worker.gpu.spec_decode.speculator", "DraftModelSpeculator"),
    ("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer"),
)


def let_drafts_choose(loaded: Callable[[Any, list[str]], None]) -> None:
    """Let the layers of a model that drafts have the backend that vLLM, or the user, chooses for them.

    Why: the V2 runner builds such layers with the model's own backend, EAGLE's and MTP's unless
    `speculative_config.attention_backend` names one, and a draft model's whatever is named. How: `load_model` of the
    classes that draft is wrapped; while it runs, the configuration names what the user named for drafts, and nothing
    where that is nothing. Called when layers of the model are loaded, in the process that loads the drafts next. Can
    go when vLLM never takes the model's backend for drafts, as its V1 runner already does not.

    Args:
        loaded: is handed the engine's configuration and the names of the new attention layers.

    Raises:
        ValueError: this vLLM loads drafts in another way.
    """
    found = [getattr(sys.modules.get(module), name, None) for module, name in LOADERS]
    kinds = [kind for kind in found if kind is not None]
    if not kinds or not all(hasattr(kind, "load_model") for kind in kinds):
        raise compat.does_not_fit("nothing loads drafts as it does (load_model), so they would be coded like the model")
    for kind in kinds:
        _wrap(kind, loaded)


def _wrap(kind: Any, loaded: Callable[[Any, list[str]], None]) -> None:
    original = kind.load_model
    if getattr(original, "lexico", False):
        return

    @functools.wraps(original)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        vllm_config = self.vllm_config
        if not compat.serves_lexico(vllm_config):
            return original(self, *args, **kwargs)
        layers = vllm_config.compilation_config.static_forward_context
        before = set(layers)
        with _drafts_backend_named(vllm_config):
            result = original(self, *args, **kwargs)
        loaded(vllm_config, [name for name in layers if name not in before])
        return result

    load_model.lexico = True  # type: ignore[attr-defined]
    kind.load_model = load_model


@contextlib.contextmanager
def _drafts_backend_named(vllm_config: Any) -> Iterator[None]:
    """The configuration names the drafts' backend, and LEXICO for no kind of layer."""
    attention = vllm_config.attention_config
    kept = attention.backend, attention.backend_per_kind
    others = {kind: one for kind, one in kept[1].items() if getattr(one, "name", None) != NAME}
    attention.backend, attention.backend_per_kind = vllm_config.speculative_config.attention_backend, others
    try:
        yield
    finally:
        attention.backend, attention.backend_per_kind = kept
