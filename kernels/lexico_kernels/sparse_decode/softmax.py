"""Online softmax over tiles of keys and values, with scores in base 2: what both ways of `sparse_decode` share."""

import triton
import triton.language as tl

from lexico_kernels.device.records import load_raw

LOG2_E = 1.4426950408889634  # times a score in base e
LN_2 = tl.constexpr(0.6931471805599453)
TWICE_LOG2_E = tl.constexpr(2 * LOG2_E)


@triton.jit
def empty_state(G_PAD: tl.constexpr, D_PAD: tl.constexpr):
    """Of no tokens: largest score (base 2), sum of weights and sum of weighted values of each query head."""
    return (
        tl.full([G_PAD], -float("inf"), tl.float32),
        tl.zeros([G_PAD], tl.float32),
        tl.zeros([G_PAD, D_PAD], tl.float32),
    )


@triton.jit
def weighed_against_sink(out, lse, sinks_ptr, query_head):
    """What is left of a head's result beside a score whose value is nothing; all where there are no sinks.

    lse: natural, of the scores behind the result.
    """
    if sinks_ptr is not None:
        out *= tl.sigmoid(lse - tl.load(sinks_ptr + query_head).to(tl.float32))
    return out


@triton.jit
def soft_capped(scores, CAP: tl.constexpr):
    """CAP * tanh(scores / CAP), both in base 2; the scores as they are where CAP is 0."""
    if CAP > 0:
        size = 1 - 2 / (tl.exp2(tl.abs(scores) * (TWICE_LOG2_E / CAP)) + 1)  # tanh, 1 where the power is infinite
        scores = tl.where(scores < 0, -CAP, CAP) * size
    return scores


@triton.jit
def attend(q, k, v, valid, offset, state, factor, CAP: tl.constexpr):
    """Fold a tile into the state.

    q [G_PAD, D_PAD]; k, v [TILE, D_PAD] in q's dtype, 0 where not valid; offset [G_PAD] is added to the scaled scores
    before they are capped.
    """
    top, total, acc = state
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * factor + offset[:, None]
    scores = soft_capped(scores, CAP)
    scores = tl.where(valid[None, :], scores, -float("inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    decay = tl.exp2(top - new_top)
    total = total * decay + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return new_top, total, acc


@triton.jit
def attend_raw(
    q, state, first, end, tail, table_ptr, head, factor, SIZES: tl.constexpr, TILE: tl.constexpr, CAP: tl.constexpr
):
    """Fold the raw tokens at positions [first, end) into the state. table_ptr: the request's row of tail pages."""
    for at in range(first, end, TILE):
        positions = at + tl.arange(0, TILE)
        valid = positions < end
        k = load_raw(tail, table_ptr, positions, valid, head, 0, SIZES)
        v = load_raw(tail, table_ptr, positions, valid, head, 1, SIZES)
        no_offset = tl.zeros([q.shape[0]], tl.float32)
        state = attend(q, k.to(q.dtype), v.to(q.dtype), valid, no_offset, state, factor, CAP)
    return state


@triton.jit
def load_queries(query, token, first_head, heads, SIZES: tl.constexpr, count):
    """Queries [G_PAD, D_PAD] of heads first_head + heads, and the mask of those that are: `count`, the first D."""
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    dims = tl.arange(0, D_PAD)
    mask = (heads < count)[:, None] & (dims < D)[None, :]
    rows = query.data + token * query.token_stride + (first_head + heads)[:, None] * query.head_stride + dims[None, :]
    return tl.load(rows, mask=mask, other=0.0), mask
