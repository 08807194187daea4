"""Sparse-coded KV cache on torch and Triton: code a token's K and V, attend over codes, rebuild dense history.

The operations are in `lexico_kernels.ops`. Modules of this package have their names, so they
are not repeated here.
"""

from lexico_kernels.memory.codebook import Codebook
from lexico_kernels.memory.layout import KV, CodeLayout
from lexico_kernels.memory.pages import LayerCache, LayerStack, RequestTables

__all__ = ["KV", "CodeLayout", "Codebook", "LayerCache", "LayerStack", "RequestTables"]
