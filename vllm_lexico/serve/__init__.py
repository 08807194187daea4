"""Serving through vLLM: the attention backend LEXICO.

`LexicoBackend` is what vLLM resolves the name to. It is loaded when it is asked for, and where this vLLM lacks a name
that it imports the start ends with one sentence.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "LexicoBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm_lexico import compat

    with compat.failures_in_a_sentence("importing what LEXICO needs of it"):
        from vllm_lexico.serve.backend import LexicoBackend
        from vllm_lexico.serve.impl import LexicoImpl  # here, so that a name which it lacks is in the sentence too

        assert LexicoBackend.get_impl_cls() is LexicoImpl
    return LexicoBackend
