"""What can be known before anything is spawned, checked in the process that the user started.

There a refusal is the last line that the user sees. `compat.check_engine_configs` has this called with each
configuration that vLLM makes for an engine; the workers check again whatever they are handed.
"""

from __future__ import annotations

import logging
from typing import Any

from vllm_lexico import _adopt_connector, compat, last_word
from vllm_lexico.compat import connectors
from vllm_lexico.config import without_backend
from vllm_lexico.serve import metrics, other_layers, refusals
from vllm_lexico.serve.setup import LexicoSetup, search_anew

logger = logging.getLogger("vllm.lexico")


def check(vllm_config: Any, given_cache_dtype: str) -> None:
    """Refuse what cannot be served, find or train the dictionary, and prepare that later refusals are repeated last.

    What it serves is published for /metrics: in a server this is the process that answers there, or one of several.

    Args:
        vllm_config: vLLM's `VllmConfig`, in which LEXICO is asked for by the backend's name or by settings for it.
        given_cache_dtype: --kv-cache-dtype as the user gave it, "auto" if not at all.

    Raises:
        ValueError: one sentence that says what to do.
    """
    if not compat.serves_lexico(vllm_config):
        said = without_backend(vllm_config.additional_config)
        if said is not None:
            raise ValueError(said)
        return
    if given_cache_dtype == "auto":
        keep_models_dtype(vllm_config)
    refusals.refuse(refusals.engine_refusals(vllm_config))
    refusals.refuse(refusals.model_refusals(vllm_config))
    search_anew()
    setup = LexicoSetup.of(vllm_config)
    setup.dictionary()
    metrics.publish(setup, vllm_config.model_config)
    other_layers.leave(vllm_config)
    last_word.prepare()
    compat.repeat_refusals_last()
    if vllm_config.kv_transfer_config is not None:
        connectors.tell_of_connectors(_adopt_connector)


def keep_models_dtype(vllm_config: Any) -> None:
    """Undo that "auto" follows a checkpoint's scheme for its cache, which codes replace.

    ModelOpt's scheme is in the configuration already; that of compressed-tensors comes in when a layer is built, unless
    the cache's dtype is named.
    """
    cache, own = vllm_config.cache_config, refusals.dtype_name(vllm_config.model_config.dtype)
    scheme = getattr(vllm_config.quant_config, "kv_cache_scheme", None)
    asked = "fp8" if cache.cache_dtype == "auto" and scheme is not None else cache.cache_dtype
    if asked == "auto" or own not in refusals.HALF_DTYPES:
        return
    logger.info("the checkpoint asks for a KV cache in %s; LEXICO's codes replace it, and the rest is %s", asked, own)
    cache.cache_dtype = own
