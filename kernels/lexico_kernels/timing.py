"""Times of the operations at serving shapes: `python -m lexico_kernels.timing` on a CUDA device. Checks results
first."""

import torch

from lexico_kernels import ops, reference
from lexico_kernels.memory.layout import CodeLayout
from lexico_kernels.testing import assert_close, poisoned_cache, random_problem

LAYOUT = CodeLayout(head_dim=128, num_kv_heads=8, key_sparsity=15, value_sparsity=15)
ATOMS, QUERY_HEADS, SCALE = 4096, 32, 128**-0.5


def milliseconds(call, repeats: int = 20) -> float:
    """Median time of a call on the device, after three to warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeats // 2]


def captured(call, calls: int = 1):
    """A CUDA graph of so many calls, after two to warm up, and what the last of them returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = call()
    return graph, result


def graph_milliseconds(call, calls: int, repeats: int) -> float:
    """Median time of one call of `calls` in a replayed CUDA graph, as a decode step runs it."""
    graph, _ = captured(call, calls)
    return milliseconds(graph.replay, repeats) / calls


def time_encode(vectors: int) -> str:
    """omp_encode of that many vectors, K and V together."""
    tokens = vectors // (2 * LAYOUT.num_kv_heads)
    pages = 2 + tokens // LAYOUT.block_tokens
    cache = poisoned_cache(LAYOUT, pages, atoms=ATOMS, dtype=torch.bfloat16, device="cuda")
    key, value = torch.randn(2, tokens, LAYOUT.num_kv_heads, 128, device="cuda", dtype=torch.bfloat16)
    source = torch.arange(tokens, device="cuda", dtype=torch.int32)
    destination = torch.arange(tokens, device="cuda") + LAYOUT.block_tokens
    took = milliseconds(lambda: ops.omp_encode(key, value, cache, source, destination))
    return f"omp_encode {vectors:7d} vectors: {took * 1e3:9.1f} us, {vectors / took / 1e3:6.3f} M vectors/s"


def time_skipped(tokens: int) -> str:
    """omp_encode when every entry is skipped, as in most decode steps."""
    cache = poisoned_cache(LAYOUT, 2, atoms=ATOMS, dtype=torch.bfloat16, device="cuda")
    key = torch.randn(tokens, LAYOUT.num_kv_heads, 128, device="cuda", dtype=torch.bfloat16)
    source = torch.zeros(tokens, device="cuda", dtype=torch.int32)
    destination = torch.zeros(tokens, device="cuda", dtype=torch.int64)
    took = milliseconds(lambda: ops.omp_encode(key, key, cache, source, destination))
    return f"omp_encode {tokens} skipped tokens: {took * 1e3:.1f} us"


def time_decode(batch: int, context: int) -> str:
    """sparse_decode of one token per request, checked against the twin on the first of them."""
    problem = random_problem(
        LAYOUT, [context] * batch, atoms=ATOMS, dtype=torch.bfloat16, device="cuda", raw_tokens=256
    )
    query = torch.randn(batch, QUERY_HEADS, 128, device="cuda", dtype=torch.bfloat16)
    request = torch.arange(batch, device="cuda", dtype=torch.int32)
    seq_len = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    inputs = (problem.cache, problem.tables)
    out, lse = ops.sparse_decode(query, *inputs, request, seq_len, scale=SCALE)
    want, want_lse = reference.sparse_decode(query[:1], *inputs, request[:1], seq_len[:1], scale=SCALE)
    assert_close(out[:1], want, "attention", torch.bfloat16)
    assert_close(lse[:1], want_lse, "lse", torch.bfloat16)
    took = milliseconds(lambda: ops.sparse_decode(query, *inputs, request, seq_len, scale=SCALE))
    token_heads = batch * context * LAYOUT.num_kv_heads / took / 1e6
    return f"sparse_decode batch {batch} x {context}: {took * 1e3:.1f} us, {token_heads:.2f} G token-heads/s"


def time_reconstruct(tokens: int) -> str:
    """Reconstruct a coded history."""
    problem = random_problem(LAYOUT, [tokens], atoms=ATOMS, dtype=torch.bfloat16, device="cuda", raw_tokens=0)
    key, value = torch.empty(2, tokens, LAYOUT.num_kv_heads, 128, device="cuda", dtype=torch.bfloat16)
    position = torch.arange(tokens, device="cuda", dtype=torch.int32)
    request = torch.zeros_like(position)
    took = milliseconds(lambda: ops.reconstruct(problem.cache, problem.tables, request, position, key, value))
    return f"reconstruct {tokens} tokens: {took * 1e3:.1f} us"


def main() -> None:
    """Print the device and all times."""
    print(torch.cuda.get_device_name())
    for vectors in (32, 512, 2048, 16384, 131072):
        print(time_encode(vectors))
    print(time_skipped(256))
    for batch, context in ((1, 8192), (16, 1024), (16, 8192), (64, 8192)):
        print(time_decode(batch, context))
    for tokens in (4096, 16384):
        print(time_reconstruct(tokens))


if __name__ == "__main__":
    main()
