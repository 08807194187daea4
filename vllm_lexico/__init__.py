"""vllm-lexico: serve language models from a sparsely coded KV cache inside vLLM.

vLLM loads this package through the entry point `vllm.general_plugins` in each of its processes, also where LEXICO is
not used. So nothing heavy is imported here: `register` only adds a name, and has a use of it checked.
"""

from typing import Any

NAME = "LEXICO"
BACKEND = "vllm_lexico.serve.LexicoBackend"

__version__ = "0.1.0"
__all__ = ["BACKEND", "NAME", "register"]


def register() -> None:
    """Make `--attention-backend LEXICO` a valid name in this process. Calling it again changes nothing.

    Never raises: vLLM calls it wherever this package is installed (see `compat.register`).
    """
    from vllm_lexico import compat

    compat.register(NAME, BACKEND, _check_before_start)


def _check_before_start(vllm_config: Any, given_cache_dtype: str) -> None:
    from vllm_lexico.serve.before_start import check

    check(vllm_config, given_cache_dtype)


def _adopt_connector(connector: Any, vllm_config: Any, kv_cache_config: Any) -> None:
    from vllm_lexico.serve.connectors.adopt import adopt

    adopt(connector, vllm_config, kv_cache_config)
