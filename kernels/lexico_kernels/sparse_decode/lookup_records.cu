// Records of "packed16" codes as registers hold them, and where the level of an entry is looked up; `records.cu` comes
// before this in one translation unit, `lookup.cu` behind it.
//
// Macros: LEVELS_FROM (see below), MAX_ATOMS, and those of `records.cu`.

static_assert(NUM_LEVELS == 16 && LEVEL_BITS == 4 && MAX_ATOMS == 4096, "an entry is 12 bits of atom, 4 of level");

enum { FROM_SHARED = 0, FROM_BYTES = 1 };  // where an entry's level is looked up

template <int S>
struct Record {
  static constexpr int WORDS = (S + 2) / 2;
  u32 word[WORDS];

  __device__ float scale() const { return __uint_as_float(word[0] << 16); }  // bf16
};

// Two halfwords of a record, from an even one on.
__device__ u32 load_word(const char* head, RecordAddress address, u32 slot, int halfword) {
  return load_word_once(head + halfword_offset(address, slot, halfword));
}

template <int S>
__device__ Record<S> load_record(const char* head, RecordAddress address, u32 slot) {
  Record<S> record;
#pragma unroll
  for (int i = 0; i < (S + 1) / 2; i++) record.word[i] = load_word(head, address, slot, 2 * i);
  if constexpr (S % 2 == 0) record.word[S / 2] = load_half_once(head + halfword_offset(address, slot, S));
  return record;
}

// Entry i of a record (0 .. S - 1) as it lies in the low half of a word; the halfword before entry 0 is the scale.
template <int S>
__device__ u32 entry_of(const Record<S>& record, int i) {
  const u32 word = record.word[(i + 1) / 2];
  return (i + 1) & 1 ? word >> 16 : word & 0xffff;
}

// Byte offset of an atom's row of `row_bytes`.
template <int ROW_BYTES, int ATOMS>
__device__ u32 row_offset(u32 entry) {
  if constexpr (ATOMS == MAX_ATOMS) {  // every atom's number is one of the dictionary
    if constexpr (ROW_BYTES <= 16) return (entry / (16 / ROW_BYTES)) & ((MAX_ATOMS - 1u) * ROW_BYTES);
    return (entry * (ROW_BYTES / 16)) & ((MAX_ATOMS - 1u) * ROW_BYTES);
  } else {  // whatever the bytes are, stay within the dictionary
    return min(entry >> LEVEL_BITS, ATOMS - 1u) * ROW_BYTES;
  }
}

// Sixteen levels of 16 bits: in shared memory a word each, or as bytes that instructions select from.
struct Levels {
  Shared shared;  // 16 words
  u32 low[4], high[4];
};

// The levels of all halfwords of two words, where the halfwords are.
__device__ void select_levels(const Levels& levels, u32 first, u32 second, u32& first_out, u32& second_out) {
  const u32 nibbles = (first & 0x000f000f) | ((second << 4) & 0x00f000f0);
  const u32 all = __byte_perm(nibbles, 0, 0x4420);  // first low, second low, first high, second high
  const u32 upper = __byte_perm(0x0000ff00, 0, (all >> 3) & 0x1111);  // bytes of ones where the level is 8 or more
  const u32 index = all & 0x7777;
  const u32 low = (__byte_perm(levels.low[0], levels.low[1], index) & ~upper) |
                  (__byte_perm(levels.low[2], levels.low[3], index) & upper);
  const u32 high = (__byte_perm(levels.high[0], levels.high[1], index) & ~upper) |
                   (__byte_perm(levels.high[2], levels.high[3], index) & upper);
  first_out = __byte_perm(low, high, 0x6240);
  second_out = __byte_perm(low, high, 0x7351);
}

// The level words of a record's entries. A word has the level in its high half; PAIRED: in both.
template <int S, bool PAIRED>
__device__ void find_levels(const Levels& levels, const Record<S>& record, u32 (&out)[S]) {
  if constexpr (LEVELS_FROM == FROM_BYTES) {
    constexpr int WORDS = Record<S>::WORDS;
    u32 pair[WORDS + 1];
#pragma unroll
    for (int i = 0; i < WORDS; i += 2) {
      const u32 second = i + 1 < WORDS ? record.word[i + 1] : 0;
      select_levels(levels, record.word[i], second, pair[i], pair[i + 1]);
    }
#pragma unroll
    for (int i = 0; i < S; i++) {
      const u32 both = pair[(i + 1) / 2];
      const bool high = (i + 1) & 1;
      if constexpr (PAIRED) out[i] = twice(both, high);
      else out[i] = high ? both : both << 16;  // what is left in the low half is 2^-16 of a level
    }
  } else {
#pragma unroll
    for (int i = 0; i < S; i++) {
      const u32 entry = entry_of(record, i);
      out[i] = load_shared(levels.shared + (entry & (NUM_LEVELS - 1)) * 4);
    }
  }
}

__device__ void keep_levels(Levels& levels, u32* words) {
  levels.shared = shared_address(words);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 a = words[4 * i], b = words[4 * i + 1], c = words[4 * i + 2], d = words[4 * i + 3];
    const u32 first = __byte_perm(a, b, 0x7632), second = __byte_perm(c, d, 0x7632);  // high halves
    levels.low[i] = __byte_perm(first, second, 0x6420);
    levels.high[i] = __byte_perm(first, second, 0x7531);
  }
}
