// Where "packed16" records lie in a page, as `layout.CodeLayout` says; kernels come behind this in one translation unit.
//
// Macros, from `records.macros`: P tokens of a page, HEAD_BYTES of one head in it, SPAN_TOKENS, WORD_BYTES, NUM_LEVELS,
// LEVEL_BITS, and of keys and values, KEY_ and VALUE_: SPARSITY, OFFSET of the records in a head, RECORD_BYTES.

struct RecordAddress {
  int offset, record_bytes;
};
constexpr RecordAddress KEY_ADDRESS = {KEY_OFFSET, KEY_RECORD_BYTES}, VALUE_ADDRESS = {VALUE_OFFSET, VALUE_RECORD_BYTES};
static_assert(KEY_RECORD_BYTES == 2 * (KEY_SPARSITY + 1) && VALUE_RECORD_BYTES == 2 * (VALUE_SPARSITY + 1),
              "a record is scale and entries");

// Where a halfword of the record at a slot of a page lies in its head: 0 is the scale, i + 1 entry i. The last one alone
// can be no half of a word; then the tokens of a span have it in a row of halfwords.
__device__ __forceinline__ int halfword_offset(RecordAddress address, unsigned slot, int halfword) {
  const int word = halfword / 2, token_bytes = word < address.record_bytes / WORD_BYTES ? WORD_BYTES : 2;
  return address.offset + int(slot / SPAN_TOKENS) * (SPAN_TOKENS * address.record_bytes) +
         word * (SPAN_TOKENS * WORD_BYTES) + halfword % 2 * 2 + int(slot % SPAN_TOKENS) * token_bytes;
}
