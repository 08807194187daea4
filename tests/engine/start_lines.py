"""What an engine says of its cache when it starts, in a process of its own."""

import logging
from typing import Any

from engines import ask, make_tokens


def started_cache(model: str, lexico: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Start an engine with LEXICO on weights that are not there.

    Returns:
        line: LEXICO's line at start.
        tokens: that fit, as vLLM counts them itself.
        batches: steps that may be under way at once.
    """
    import vllm

    said: list[str] = []
    # Not a handler: vLLM's engines take those away.
    logging.getLogger("vllm.lexico").info = lambda form, *given: said.append(form % given if given else form)
    llm = vllm.LLM(
        model,
        attention_backend="LEXICO",
        additional_config={"lexico": lexico},
        enforce_eager=True,
        load_format="dummy",
        skip_tokenizer_init=True,
        **settings,
    )
    ask(llm, [make_tokens(0, 8)], 1)  # the line comes with the first step
    config = llm.llm_engine.vllm_config
    (line,) = [line for line in said if line.startswith("LEXICO:")]
    return {
        "line": line,
        "tokens": config.cache_config.kv_cache_size_tokens,
        "batches": config.max_concurrent_batches,
    }
