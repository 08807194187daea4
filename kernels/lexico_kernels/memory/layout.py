"""CodeLayout: the only home of the sizes and offsets of coded and raw tokens in memory.

A code page holds P = `block_tokens` tokens of one layer. KV head h starts at byte h * head_bytes: first the K records
of all P tokens, then the V records. A record is made of fields, arrays over the tokens (`Field`):

- "packed16": bf16 scale, then S uint16 entries = atom << 4 | level: 2(S + 1) bytes. The records of a span of 32 tokens
  lie side by side, word by word: scale and entry 0 of all 32, then entries 1 and 2 of all 32, ...; where S is even the
  last entry of all 32 follows. So a warp that loads a word of each token's record loads 128 consecutive bytes.
- "paper" (Lexico, section 3.3): int16 atoms and fp8 e4m3 coefficients, plus a bf16 scale: 3S + 2 bytes. Each field is
  an array of its own over the page, which keeps 2-byte loads aligned when S is odd.
- "exact": the vector itself, for tests.

A tail page holds R = `tail_tokens` raw tokens as [Hk, R, 2, D]. R is the largest power of two that fits the bytes of a
code page, because the engine wants pages of both kinds to have one size; the rest of the page is padding.
"""

from dataclasses import dataclass
from typing import NamedTuple

CODECS = ("packed16", "paper", "exact")
KERNEL_CODECS = ("packed16", "exact")  # that kernels on CUDA know; the other is for studies with the twins
# Of what the bytes of a page mean; a change of them gets the next number, so that engines that share pages agree on it.
LAYOUT_VERSION = 2
KV = ("key", "value")
MAX_ATOMS = 4096
MAX_SPARSITY = 31
NUM_LEVELS = 16
LEVEL_BITS = 4
# Tokens coded at a time: aligned spans of this many, so that in decode a launch has enough vectors to fill the device
# while no step has to code a whole block. Divides every block size. A span's records lie, and are ordered, together.
SPAN_TOKENS = 32
# A span's delay (docs/design/write.md) is a hash of its page's id: two products of DELAY_BITS bits, a shift between.
DELAY_FACTORS = (1640531527, 1812433253)
DELAY_BITS, DELAY_SHIFT = 31, 15

# A code's scale is raised as if it lost this share of its vector's energy at most: worse codes say little.
MOST_LOST = 0.7
BF16_MAX = (2 - 2**-7) * 2.0**127

SCALE_BYTES = 2
ENTRY_BYTES = 2  # packed16: atom and level
WORD_BYTES = 4  # packed16: of a record that the tokens of a span have side by side
INDEX_BYTES = 2  # paper
FP8_BYTES = 1  # paper


class Field(NamedTuple):
    """One array of the records of K or V within a page, [span][piece][token of the span][byte].

    Piece i of token t starts at offset + t // span_tokens * span_bytes + (i * span_tokens + t % span_tokens) * width.
    """

    offset_bytes: int  # from the start of these records of a head
    width_bytes: int  # of a piece
    pieces: int  # that a token has of this field, one after another in its record
    span_tokens: int  # that have each piece side by side
    span_bytes: int  # from one span to the next


class RecordAddress(NamedTuple):
    """Plain numbers that a kernel needs to find records of K or V.

    "exact": the vector of a slot starts at offset + slot * record_bytes. "packed16": the kernels' own `halfword_offset`
    (device/records.py, memory/records.cu) finds the scale and each entry as `CodeLayout.fields` lays them out.
    """

    sparsity: int
    offset: int  # of the first record, from the start of a head
    record_bytes: int


@dataclass(frozen=True)
class CodeLayout:
    """Sizes and offsets of one layer's pages.

    Attributes:
        head_dim: D, numbers in a K or V vector; a multiple of 16 from 16 to 256.
        num_kv_heads: Hk, KV heads of this rank.
        key_sparsity: S of keys, atoms per vector, 1 to 31. "exact" ignores both sparsities.
        value_sparsity: S of values.
        codec: "packed16", "paper" or "exact".
        block_tokens: P, tokens per code page; a power of two, at least 32 (a span).
        element_bytes: of a number in the model's dtype: 2, or 4 for float32.
        raw_tokens: R, where tail pages are as large as other layers' code pages; 0: as large as this layer's.

    Raises:
        ValueError: anything else.
    """

    head_dim: int
    num_kv_heads: int
    key_sparsity: int
    value_sparsity: int
    codec: str = "packed16"
    block_tokens: int = 128
    element_bytes: int = 2
    raw_tokens: int = 0

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise ValueError(f"codec {self.codec!r} is unknown; allowed: {', '.join(CODECS)}; choose one of these")
        if not 16 <= self.head_dim <= 256 or self.head_dim % 16:
            raise ValueError(
                f"head_dim {self.head_dim} cannot be coded; allowed: multiples of 16 from 16 to 256; "
                "serve this model with another attention backend"
            )
        if self.num_kv_heads < 1:
            raise ValueError(f"num_kv_heads is {self.num_kv_heads}; allowed: 1 or more; give the heads of this rank")
        for kv in KV:
            sparsity = getattr(self, f"{kv}_sparsity")
            if self.codec != "exact" and not 1 <= sparsity <= MAX_SPARSITY:
                raise ValueError(
                    f"{kv}_sparsity is {sparsity}; allowed: 1 to {MAX_SPARSITY}; 15 codes 128 numbers in 32 bytes"
                )
        if self.block_tokens < SPAN_TOKENS or self.block_tokens & (self.block_tokens - 1):
            raise ValueError(
                f"block_tokens is {self.block_tokens}; allowed: powers of two from {SPAN_TOKENS}; "
                "128 is the usual choice"
            )
        if self.element_bytes not in (2, 4):
            raise ValueError(
                f"element_bytes is {self.element_bytes}; allowed: 2 or 4; run the model in bfloat16, float16 or float32"
            )
        if self.tail_tokens < 1:
            raise ValueError(
                f"a page of {self.page_bytes} bytes cannot hold one raw token of {self.raw_token_bytes} bytes per "
                "head; allowed: pages that hold at least one; raise the sparsity or block_tokens"
            )

    def sparsity(self, kv: str) -> int:
        """Atoms per vector of "key" or "value"; 0 for "exact"."""
        if self.codec == "exact":
            return 0
        return self.key_sparsity if kv == "key" else self.value_sparsity

    def vector_bytes(self, kv: str) -> int:
        """Bytes of the code of one vector."""
        S = self.sparsity(kv)
        if self.codec == "exact":
            return self.head_dim * self.element_bytes
        return SCALE_BYTES + S * (ENTRY_BYTES if self.codec == "packed16" else INDEX_BYTES + FP8_BYTES)

    def fields(self, kv: str) -> dict[str, Field]:
        """The arrays that make up the records of K or V, by name, in the order in which a record lists them."""
        S, P, size = self.sparsity(kv), self.block_tokens, self.vector_bytes(kv)
        if self.codec == "packed16":  # halfword 0 is the scale, halfword i + 1 entry i
            words, odd_bytes = divmod(size, WORD_BYTES)
            span = SPAN_TOKENS, SPAN_TOKENS * size
            found = {"words": Field(0, WORD_BYTES, words, *span)}
            if odd_bytes:
                found["last entry"] = Field(SPAN_TOKENS * words * WORD_BYTES, ENTRY_BYTES, 1, *span)
            return found
        page = P, P * size
        if self.codec == "exact":
            return {"vector": Field(0, size, 1, *page)}
        index_bytes, coefficient_bytes = INDEX_BYTES * S, FP8_BYTES * S
        return {
            "scale": Field(0, SCALE_BYTES, 1, *page),
            "indices": Field(P * SCALE_BYTES, index_bytes, 1, *page),
            "coefficients": Field(P * (SCALE_BYTES + index_bytes), coefficient_bytes, 1, *page),
        }

    def kv_offset_bytes(self, kv: str) -> int:
        """Where the records of "key" or "value" start within a head."""
        return 0 if kv == "key" else self.block_tokens * self.key_bytes

    def address(self, kv: str) -> RecordAddress:
        """What a kernel needs to find the records of "key" or "value"."""
        return RecordAddress(self.sparsity(kv), self.kv_offset_bytes(kv), self.vector_bytes(kv))

    @property
    def key_bytes(self) -> int:
        """Bytes of the code of one K vector."""
        return self.vector_bytes("key")

    @property
    def value_bytes(self) -> int:
        """Bytes of the code of one V vector."""
        return self.vector_bytes("value")

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V codes of one head."""
        return self.key_bytes + self.value_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in a code page."""
        return self.block_tokens * self.token_bytes

    @property
    def cell_bytes(self) -> int:
        """Bytes that a page has for one token of a head: its codes, rounded up to whole numbers of the model's dtype.

        An engine that views pages in that dtype needs it. What the rounding adds lies at the end of the page.
        """
        return -(-self.token_bytes // self.element_bytes) * self.element_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a code page of one layer."""
        return self.num_kv_heads * self.block_tokens * self.cell_bytes

    @property
    def raw_token_bytes(self) -> int:
        """Bytes of one token's K and V of one head in the model's dtype."""
        return 2 * self.head_dim * self.element_bytes

    @property
    def ratio(self) -> float:
        """Coded bytes over raw bytes, rounding included."""
        return self.cell_bytes / self.raw_token_bytes

    @property
    def tail_tokens(self) -> int:
        """R: raw tokens in a page, the largest power of two that fits; 0 where not even one does."""
        if self.raw_tokens:
            return self.raw_tokens
        fitting = self.block_tokens * self.cell_bytes // self.raw_token_bytes
        return 1 << (fitting.bit_length() - 1) if fitting else 0

    @property
    def tail_page_bytes(self) -> int:
        """Bytes of a tail page that hold tokens; the rest up to `page_bytes` is padding."""
        return self.num_kv_heads * self.tail_tokens * self.raw_token_bytes
