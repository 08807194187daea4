"""Sparse-coded KV cache on torch and Triton: code a token's K and V, attend over codes, rebuild dense history."""

from lexico_kernels.cache import Codebook, LayerCache, LayerStack, RequestTables
from lexico_kernels.layout import PARTS, CodeLayout
from lexico_kernels.ops import (
    decode_scratch_bytes,
    omp_encode,
    omp_encode_layers,
    pursue,
    reconstruct,
    sparse_decode,
    with_screen,
    write_tail,
)

__all__ = [
    "PARTS",
    "CodeLayout",
    "Codebook",
    "LayerCache",
    "LayerStack",
    "RequestTables",
    "decode_scratch_bytes",
    "omp_encode",
    "omp_encode_layers",
    "pursue",
    "reconstruct",
    "sparse_decode",
    "with_screen",
    "write_tail",
]
