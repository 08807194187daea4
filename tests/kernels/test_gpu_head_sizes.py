"""Compiled kernels for heads that are neither 64 nor 128 wide: `pytest -m gpu tests/kernels/test_gpu_head_sizes.py`.

`test_gpu.py` has such heads among the shapes of what it tests with all.
"""

import pytest
import torch
from lexico_kernels import CodeLayout, LayerStack, ops, reference
from lexico_kernels.device.launch import fp8_fits
from lexico_kernels.omp_encode import tiles as omp
from lexico_kernels.sparse_decode import lookup
from lexico_kernels.sparse_decode import portable as decode
from lexico_kernels.testing import (
    OMP_ENERGY_RATIO,
    assert_close,
    fp8_cache,
    poisoned_cache,
    random_problem,
    residual_energy,
    vectors_like_the_dictionary,
)

pytestmark = pytest.mark.gpu

N, HK, P = 4096, 2, 128


def layout(head_dim, S):
    return CodeLayout(head_dim, HK, S, S)


def cuda(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize(("head_dim", "S"), [(192, 23), (256, 15), (256, 31)])
def test_omp_encode_of_wide_heads_by_fp8_atoms_and_of_all_layers(head_dim, S):
    """At as many atoms as serving chooses by their copies in fp8, and by the launch that codes whole layers."""
    assert fp8_fits(head_dim, S)
    it, count = layout(head_dim, S), 1000
    pages = 2 + count // it.tail_tokens
    caches = [poisoned_cache(it, pages, atoms=N, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    key, value = vectors_like_the_dictionary(count, caches[0])
    source, destination = torch.arange(count, device="cuda", dtype=torch.int32), torch.arange(count, device="cuda") + P
    reference.omp_encode(key, value, caches[0], source, destination)
    omp.omp_encode(key, value, fp8_cache(caches[1]), source, destination)
    slots = torch.arange(count, device="cuda") + it.tail_tokens
    ops.write_tail(key, value, caches[2], slots)
    ops.omp_encode_layers(LayerStack.of(caches[2:]), (-1 - slots).int(), destination)
    for kv, vectors in (("key", key), ("value", value)):
        want, *others = (float(residual_energy(cache, destination, vectors, kv).sum()) for cache in caches)
        assert all(got <= OMP_ENERGY_RATIO["few"] * want for got in others), (kv, want, others)


@pytest.mark.parametrize(
    ("group", "head_dim", "S"), [(4, 80, 9), (2, 96, 11), (8, 192, 23), (4, 256, 15), (8, 256, 31)]
)
def test_portable_decode_and_reconstruct_of_other_head_sizes(group, head_dim, S):
    lengths = [1, P + 1, 5000]
    problem = random_problem(layout(head_dim, S), lengths, atoms=N, dtype=torch.bfloat16, device="cuda")
    query = torch.randn(3, 2 * group, head_dim, device="cuda", dtype=torch.bfloat16)
    args = (query, problem.cache, problem.tables, cuda(range(3)), cuda(lengths))
    want, want_lse = reference.sparse_decode(*args, scale=head_dim**-0.5)
    out, lse = decode.sparse_decode(*args, scale=head_dim**-0.5, out=torch.full_like(query, torch.nan))
    assert_close(out, want, "attention", torch.bfloat16)
    assert_close(lse, want_lse, "lse", torch.bfloat16)
    dense = [torch.full((2, 4900, 2, head_dim), torch.nan, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    tokens = (problem.cache, problem.tables, cuda([2] * 4900), cuda(range(7, 4907)))
    reference.reconstruct(*tokens, *dense[0])
    ops.reconstruct(*tokens, *dense[1])
    assert_close(dense[1], dense[0], "dense", torch.bfloat16)


@pytest.mark.parametrize("group", [2, 3, 8])
@pytest.mark.parametrize("module", [lookup, decode])
def test_soft_cap(module, group):
    """Of scores beyond it and below; 9000 tokens are several splits."""
    lengths = [1, P + 1, 9000]
    problem = random_problem(layout(256, 31), lengths, atoms=N, dtype=torch.bfloat16, device="cuda", raw_tokens=200)
    query = 3 * torch.randn(3, HK * group, 256, device="cuda", dtype=torch.bfloat16)
    args = (query, problem.cache, problem.tables, cuda(range(3)), cuda(lengths))
    free = reference.sparse_decode(*args, scale=256**-0.5)
    want, want_lse = reference.sparse_decode(*args, scale=256**-0.5, soft_cap=5.0)
    assert (want_lse - free[1]).abs().mean() > 0.5
    out, lse = module.sparse_decode(*args, scale=256**-0.5, soft_cap=5.0, out=torch.full_like(query, torch.nan))
    assert_close(out, want, "attention", torch.bfloat16)
    assert_close(lse, want_lse, "lse", torch.bfloat16)
