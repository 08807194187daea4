"""write_tail on CUDA: raw tokens into the tail pages."""

import triton
import triton.language as tl
from torch import Tensor

from lexico_kernels.device.launch import WRITE_TAIL
from lexico_kernels.memory.pages import LayerCache


@triton.jit
def _write_tail(
    key_ptr,
    key_stride_t,
    key_stride_h,
    value_ptr,
    value_stride_t,
    value_stride_h,
    tail_ptr,
    tail_page_stride,
    slots_ptr,
    T,
    R: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of tokens of one head, K and V."""
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    head = tl.program_id(1)
    dims = tl.arange(0, D_PAD)
    slot = tl.load(slots_ptr + token, mask=token < T, other=-1)
    mask = (slot >= R)[:, None] & (dims < D)[None, :]
    target = tail_ptr + (slot // R) * tail_page_stride + (head * R + slot % R) * 2 * D
    key_row, value_row = token.to(tl.int64) * key_stride_t, token.to(tl.int64) * value_stride_t
    key = tl.load(key_ptr + (key_row + head * key_stride_h)[:, None] + dims[None, :], mask=mask)
    value = tl.load(value_ptr + (value_row + head * value_stride_h)[:, None] + dims[None, :], mask=mask)
    tl.store(target[:, None] + dims[None, :], key, mask=mask)
    tl.store(target[:, None] + D + dims[None, :], value, mask=mask)


def write_tail(key: Tensor, value: Tensor, cache: LayerCache, tail_slot_mapping: Tensor) -> None:
    """Triton version of `reference.write_tail`."""
    T, Hk, D = key.shape
    if T == 0:
        return
    _write_tail[(triton.cdiv(T, WRITE_TAIL.tile), Hk)](
        key,
        key.stride(0),
        key.stride(1),
        value,
        value.stride(0),
        value.stride(1),
        cache.tail_pages,
        cache.tail_pages.stride(0),
        tail_slot_mapping,
        T,
        R=cache.layout.tail_tokens,
        D=D,
        D_PAD=triton.next_power_of_2(D),
        TILE=WRITE_TAIL.tile,
        num_warps=WRITE_TAIL.num_warps,
    )
