"""Records in code pages: views of them, records of any slots read and written, and what CUDA C++ has to know of them.

A record is a row of `vector_bytes` bytes: the fields of `CodeLayout.fields` in their order, as encoding makes it and
decoding takes it. In a page its bytes lie apart.
"""

from torch import Tensor, cat

from lexico_kernels.memory.layout import KV, LEVEL_BITS, NUM_LEVELS, SCALE_BYTES, SPAN_TOKENS, WORD_BYTES, CodeLayout

FILE = "memory/records.cu"  # that kernels in CUDA C++ have before their own


def macros(layout: CodeLayout) -> dict[str, int]:
    """The macros of `records.cu`.

    Args:
        layout: of the pages, "packed16".
    """
    found = {
        "P": layout.block_tokens,
        "HEAD_BYTES": layout.head_bytes,
        "SPAN_TOKENS": SPAN_TOKENS,
        "WORD_BYTES": WORD_BYTES,
        "NUM_LEVELS": NUM_LEVELS,
        "LEVEL_BITS": LEVEL_BITS,
    }
    for kv in KV:
        sparsity, offset, record_bytes = layout.address(kv)
        fields = {"SPARSITY": sparsity, "OFFSET": offset, "RECORD_BYTES": record_bytes}
        found |= {f"{kv.upper()}_{name}": number for name, number in fields.items()}
    return found


def field_views(code_pages: Tensor, layout: CodeLayout, kv: str) -> list[Tensor]:
    """The fields of all records of K or V.

    Args:
        code_pages: uint8 [num_pages, at least page_bytes].
        layout: of the pages.
        kv: "key" or "value".

    Returns:
        Views of the pages, one per field: uint8 [num_pages, Hk, spans, pieces, span_tokens, width_bytes].
    """
    base = code_pages.storage_offset() + layout.kv_offset_bytes(kv)
    pages, heads = code_pages.shape[0], layout.num_kv_heads
    views = []
    for offset, width, pieces, tokens, span_bytes in layout.fields(kv).values():
        shape = pages, heads, layout.block_tokens // tokens, pieces, tokens, width
        strides = code_pages.stride(0), layout.head_bytes, span_bytes, tokens * width, width, 1
        views.append(code_pages.as_strided(shape, strides, base + offset))
    return views


def scale_view(code_pages: Tensor, layout: CodeLayout, kv: str) -> Tensor:
    """The scales of all records of K or V, a view of the pages: uint8 [num_pages, Hk, spans, span_tokens, 2]."""
    return field_views(code_pages, layout, kv)[0][:, :, :, 0, :, :SCALE_BYTES]


def load_records(code_pages: Tensor, layout: CodeLayout, kv: str, slots: Tensor) -> Tensor:
    """Records uint8 [M, Hk, vector_bytes] at slots int64 [M], page * P + offset."""
    pages, tokens = slots // layout.block_tokens, slots % layout.block_tokens
    found = []
    for view in field_views(code_pages, layout, kv):
        span_tokens = view.shape[4]
        found.append(view[pages, :, tokens // span_tokens, :, tokens % span_tokens].flatten(2))
    return cat(found, 2)


def store_records(code_pages: Tensor, layout: CodeLayout, kv: str, slots: Tensor, records: Tensor) -> None:
    """Write records uint8 [M, Hk, vector_bytes] to slots int64 [M], page * P + offset."""
    pages, tokens = slots // layout.block_tokens, slots % layout.block_tokens
    at = 0
    for view in field_views(code_pages, layout, kv):
        pieces, span_tokens, width = view.shape[3:]
        own = records[..., at : at + pieces * width].unflatten(2, (pieces, width))
        view[pages, :, tokens // span_tokens, :, tokens % span_tokens] = own
        at += pieces * width
