"""write_tail on CUDA: raw tokens into the tail pages."""

import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels.device.arguments import Pages, Rows, Sizes
from lexico_kernels.device.launch import WRITE_TAIL
from lexico_kernels.device.overlap import launch_options, overlap_on, trigger_next, wait_for_previous
from lexico_kernels.memory.pages import LayerCache


@triton.jit
def _load_rows(rows, token, head, mask, D_PAD: tl.constexpr):
    """Vectors of one head, [TILE, D_PAD]."""
    source = rows.data + (token.to(tl.int64) * rows.token_stride + head * rows.head_stride)
    return tl.load(source[:, None] + tl.arange(0, D_PAD)[None, :], mask=mask)


@triton.jit(do_not_specialize=["T"])
def _write_tail(key, value, tail, slots_ptr, T, SIZES: tl.constexpr, TILE: tl.constexpr, OVERLAP: tl.constexpr):
    """One tile of tokens of one head, K and V."""
    wait_for_previous(OVERLAP)
    R: tl.constexpr = SIZES.R
    D: tl.constexpr = SIZES.D
    D_PAD: tl.constexpr = SIZES.D_PAD
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.program_id(1)
    dims = tl.arange(0, D_PAD)
    slot = tl.load(slots_ptr + token, mask=token < T, other=-1)
    mask = (slot >= R)[:, None] & (dims < D)[None, :]
    target = tail.data + (slot // R) * tail.stride + (head * R + slot % R) * 2 * D
    keys, values = _load_rows(key, token, head, mask, D_PAD), _load_rows(value, token, head, mask, D_PAD)
    trigger_next(OVERLAP)
    tl.store(target[:, None] + dims[None, :], keys, mask=mask)
    tl.store(target[:, None] + D + dims[None, :], values, mask=mask)


def write_tail(key: Tensor, value: Tensor, cache: LayerCache, tail_slot_mapping: Tensor) -> None:
    """Triton version of `reference.write_tail`."""
    T, Hk, _ = key.shape
    if T == 0:
        return
    overlap = overlap_on(key)
    _write_tail[(triton.cdiv(T, WRITE_TAIL.tile), Hk)](
        Rows.of(key),
        Rows.of(value),
        Pages.tail(cache),
        tail_slot_mapping,
        T,
        SIZES=Sizes.of(cache, records=False),
        TILE=WRITE_TAIL.tile,
        OVERLAP=overlap,
        num_warps=WRITE_TAIL.num_warps,
        **launch_options(overlap),
    )
