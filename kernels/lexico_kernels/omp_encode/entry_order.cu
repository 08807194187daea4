// Puts the entries of records in an order that makes reading them fast; what they say stays the same.
//
// `lookup.cu` gives neighbouring tokens to neighbouring lanes, and all lanes take entry i of their records at once.
// Lanes whose atoms lie in the same bank wait for each other. Lanes that can meet are a set: 16 consecutive tokens of keys,
// whose atoms are 8 bytes each, on 16 pairs of banks; every fourth token of values, whose bins are 4 bytes for each of
// four heads, with neighbouring lanes at different heads, on 8 places. One warp orders one set, token by token: each atom
// goes to the free place where the fewest earlier tokens have an atom of the same banks.
//
// Macros: P tokens of a page, HEAD_BYTES, COLUMNS of a table of places and CODE_COLUMN among them, and of both parts KEY_ and VALUE_: SPARSITY, OFFSET and STRIDE of the entries.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

constexpr int GROUP_TOKENS = 32;
constexpr u32 EVERY_LANE = 0xFFFFFFFF;
constexpr u32 TAKEN = 0xFFFF;
constexpr u32 MOST = 15;  // what a counter of four bits holds

struct Part {
  int sparsity, offset, stride;
  int sets, places;  // a group's sets, and how many atoms in a row are in different banks
  int step;          // tokens from one of a set to the next
};
constexpr Part KEY = {KEY_SPARSITY, KEY_OFFSET, KEY_STRIDE, 2, 16, 1};
constexpr Part VALUE = {VALUE_SPARSITY, VALUE_OFFSET, VALUE_STRIDE, 4, 8, 4};

// Order one set's records; `records` are the entries of its first token, lane i has entry i.
__device__ __forceinline__ void order_set(const Part& part, u8* records) {
  const int lane = threadIdx.x % 32, tokens = GROUP_TOKENS / part.sets;
  const bool has_entry = lane < part.sparsity;
  auto entry_at = [&](int token) {
    return reinterpret_cast<u16*>(records + i64(token) * part.step * part.stride) + lane;
  };
  u64 counts = 0;  // of this lane's place: earlier tokens with an atom of each class, four bits each
  u32 next = has_entry ? *entry_at(0) : 0;
  for (int token = 0; token < tokens; ++token) {
    const u32 own = next;
    if (token + 1 < tokens) next = has_entry ? *entry_at(token + 1) : 0;
    u32 placed = 0;
    bool open = has_entry;
    for (int i = 0; i < part.sparsity; ++i) {
      const u32 entry = __shfl_sync(EVERY_LANE, own, i);
      const int shift = (entry >> 4) % part.places * 4;
      const u32 count = u32(counts >> shift) & MOST;
      const u32 best = __reduce_min_sync(EVERY_LANE, open ? count << 5 | lane : TAKEN);
      if ((best & 31) == lane) {
        placed = entry, open = false;
        if (count < MOST) counts += u64(1) << shift;
      }
    }
    if (has_entry) *entry_at(token) = u16(placed);
  }
}

// grid (entries / 32, heads, 2 * layers), 128 threads. A group is ordered when the last of its tokens has been coded.
// places: addresses of each layer's tensors, codes among them; or null for the one layer of `codes`.
extern "C" __global__ void __launch_bounds__(128)
    order_entries(u8* codes, const i64* places, i64 code_page_stride, const i64* destination, int M) {
  const int lane = threadIdx.x % 32, set = threadIdx.x / 32, at = blockIdx.x * 32 + lane;
  const Part part = blockIdx.z % 2 ? VALUE : KEY;
  if (places) codes = reinterpret_cast<u8*>(places[blockIdx.z / 2 * COLUMNS + CODE_COLUMN]);
  if (set >= part.sets) return;
  const i64 to = at < M ? destination[at] : -1;
  u32 ends = __ballot_sync(EVERY_LANE, to >= P && to % GROUP_TOKENS == GROUP_TOKENS - 1);
  const int first = part.step == 1 ? set * (GROUP_TOKENS / part.sets) : set;
  for (int which = 0; which < 32; ++which) {
    if (!(ends >> which & 1)) continue;
    const i64 slot = destination[blockIdx.x * 32 + which] - (GROUP_TOKENS - 1) + first;
    u8* head = codes + slot / P * code_page_stride + i64(blockIdx.y) * HEAD_BYTES;
    order_set(part, head + part.offset + slot % P * part.stride);
  }
}
