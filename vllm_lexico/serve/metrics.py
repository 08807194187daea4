"""What /metrics says of the cache: which dictionary, codec and sparsities, and what a token costs.

Set in each process that makes an engine's configuration, which in a server are those that answer over HTTP; where these
are several, prometheus_client merges what they wrote, so each gauge takes the newest. What is in use at a moment is
known to the scheduler's process alone, and vLLM's statistics have no place for it but `vllm:kv_cache_usage_perc`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import vllm_lexico
from vllm_lexico.serve import refusals

if TYPE_CHECKING:
    from prometheus_client import Gauge

    from vllm_lexico.serve.setup import LexicoSetup

MODEL = "model_name"  # as vLLM calls its own label
INFO = "lexico:cache_info"
INFO_LABELS = (
    *(MODEL, "version", "codec", "dictionary", "dictionary_file", "key_sparsity", "value_sparsity"),
    "uneven",
    *("window", "sinks", "prefix_hits"),
)
TOKEN_BYTES = "lexico:bytes_per_token"
RAW_TOKEN_BYTES = "lexico:uncoded_bytes_per_token"
EXACT_TOKENS = "lexico:exact_tokens_per_request"
WORDS = {
    INFO: "LEXICO's settings of the KV cache, as labels; the value is 1.",
    TOKEN_BYTES: "Bytes of a coded token, keys and values of all KV heads in the layers that are coded.",
    RAW_TOKEN_BYTES: "Bytes of such a token in the model's own number format.",
    EXACT_TOKENS: "Tokens that a request keeps in full precision, its newest and first ones; the others are coded.",
}


def publish(setup: LexicoSetup, model_config: Any) -> None:
    """Set the gauges for a model that is about to be served.

    Args:
        setup: of the engine; its dictionary is loaded.
        model_config: vLLM's `ModelConfig`.
    """
    model, config, dictionary = model_config.served_model_name, setup.config, setup.dictionary()
    labels = {
        MODEL: model,
        "version": vllm_lexico.__version__,
        "codec": config.codec,
        "dictionary": dictionary.info.model_name if dictionary else "",
        "dictionary_file": str(setup.dictionary_path or ""),
        "key_sparsity": str(config.sparsity.key if dictionary else ""),
        "value_sparsity": str(config.sparsity.value if dictionary else ""),
        "uneven": "" if config.uneven is None else "/".join(map(str, config.uneven)),
        "window": str(config.window),
        "sinks": str(config.sinks),
        "prefix_hits": config.prefix_hits,
    }
    _gauge(INFO, INFO_LABELS).labels(**labels).set(1)
    if dictionary is None:  # the exact codec serves models of which no fingerprint is taken
        return
    shape = dictionary.info.fingerprint
    layout = setup.layout(shape.head_dim, shape.num_kv_heads, refusals.DEFAULT_BLOCK_SIZE, model_config.dtype)
    cells = shape.num_kv_heads * len(shape.layers)
    exact_tokens = setup.window_tokens + setup.sink_blocks(layout) * layout.tail_tokens
    values = (TOKEN_BYTES, layout.cell_bytes * cells), (RAW_TOKEN_BYTES, layout.raw_token_bytes * cells)
    for name, value in (*values, (EXACT_TOKENS, exact_tokens)):
        _gauge(name, (MODEL,)).labels(model).set(value)


@functools.cache
def _gauge(name: str, labels: tuple[str, ...]) -> Gauge:
    """One per process, as prometheus_client wants it. Not named as vLLM's are, which it takes out at each start."""
    from prometheus_client import Gauge

    return Gauge(name, WORDS[name], labels, multiprocess_mode="mostrecent")
