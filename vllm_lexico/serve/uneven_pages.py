"""Pages of layers whose heads' sparsities differ, within blocks that vLLM cut into equal ones.

With the block outermost a block of the pool has the code pages of all layers of a rank side by side, each of the bytes
of the mean sparsity, as vLLM counts them. Here the same run of bytes is cut anew: in the same order, each layer takes
what its own heads need, which all together is no more. The tail's pages lie in other blocks and stay equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from vllm_lexico import compat


class PagesOfLayer(NamedTuple):
    """A layer's code pages as vLLM gives them, uint8 [pages, bytes of the mean], and the bytes that its own have."""

    given: Tensor
    own_bytes: int


def own_pages(given: Tensor, layers: Mapping[int, PagesOfLayer], index: int) -> Tensor:
    """A layer's own pages, within the same memory.

    Args:
        given: uint8 [pages, bytes of the mean], of the layer.
        layers: of all coded layers of the rank, by index.
        index: of the layer.

    Returns:
        uint8 [pages, own bytes].

    Raises:
        ValueError: the layers' pages do not lie side by side in one block, or theirs are too large for it.
    """
    in_order = sorted(layers, key=lambda each: layers[each].given.data_ptr())
    start, page_bytes = layers[in_order[0]].given.data_ptr(), given.shape[1]
    places = [layers[each].given.data_ptr() - start for each in in_order]
    room, taken = len(in_order) * page_bytes, sum(layer.own_bytes for layer in layers.values())
    strides = {layer.given.stride(0) for layer in layers.values()}
    memories = {layer.given.untyped_storage().data_ptr() for layer in layers.values()}
    side_by_side = places == list(range(0, room, page_bytes)) and len(memories) == len(strides) == 1
    if not side_by_side or min(strides) < room or taken > room:
        raise compat.does_not_fit(
            f"code pages of {len(in_order)} layers start {places} bytes apart in blocks of {sorted(strides)} bytes "
            "(KVCacheLayout.BLHNC), so layers of other sparsities would be written over one another"
        )
    before = sum(layers[each].own_bytes for each in in_order[: in_order.index(index)])
    offset = given.storage_offset() + start + before - given.data_ptr()
    return given.as_strided((given.shape[0], layers[index].own_bytes), (given.stride(0), 1), offset)
