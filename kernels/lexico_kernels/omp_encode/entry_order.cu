// Puts the entries of records in an order that makes reading them fast; what they say stays the same.
//
// `lookup.cu` gives neighbouring tokens to neighbouring lanes, and all lanes read entry i of their records at once.
// Lanes whose atoms lie in the same bank wait for each other. Lanes that can meet are a set: 16 consecutive tokens of
// keys, whose atoms are 8 bytes each, on 16 pairs of banks; every fourth token of values, whose bins are 4 bytes for each
// of four heads, with neighbouring lanes at different heads, on 8 groups of banks. One warp orders one set, token by
// token: each atom goes to the free position where the fewest earlier tokens have an atom of the same banks.
//
// Macros, from `entry_order.macros`: those of `records.cu`, which comes before; THREADS, and columns of addresses
// (LayerStack.macros).

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

static_assert(SPAN_TOKENS == 32, "ends of spans are found in 32 jobs, and counters are of at most 16 tokens");
constexpr u32 EVERY_LANE = 0xFFFFFFFF;
constexpr u32 TAKEN = 0xFFFF;
constexpr u32 MOST = 15;  // what a counter of four bits holds

struct Kv {
  int sparsity;
  RecordAddress address;
  int sets, classes;  // a span's sets, and how many atoms in a row are in different banks
  int step;           // tokens from one of a set to the next
};
constexpr Kv KEY = {KEY_SPARSITY, KEY_ADDRESS, 2, 16, 1};
constexpr Kv VALUE = {VALUE_SPARSITY, VALUE_ADDRESS, 4, 8, 4};

// Order one set's records of a head, from the one at slot `first` on; lane i has entry i.
__device__ __forceinline__ void order_set(const Kv& kv, u8* head, u32 first) {
  const int lane = threadIdx.x % 32, tokens = SPAN_TOKENS / kv.sets;
  const bool has_entry = lane < kv.sparsity;
  auto entry_at = [&](int token) {
    return reinterpret_cast<u16*>(head + halfword_offset(kv.address, first + token * kv.step, lane + 1));
  };
  u64 counts = 0;  // of this lane's position: earlier tokens with an atom of each class, four bits each
  u32 next = has_entry ? *entry_at(0) : 0;
  for (int token = 0; token < tokens; ++token) {
    const u32 own = next;
    if (token + 1 < tokens) next = has_entry ? *entry_at(token + 1) : 0;
    u32 placed = 0;
    bool open = has_entry;
    for (int i = 0; i < kv.sparsity; ++i) {
      const u32 entry = __shfl_sync(EVERY_LANE, own, i);
      const int shift = (entry >> LEVEL_BITS) % kv.classes * 4;
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

// grid (jobs / 32, heads, 2 * layers), THREADS threads. A span is ordered when the last of its tokens has been coded.
// addresses: of each layer's tensors; or null for the one layer of `codes`.
extern "C" __global__ void __launch_bounds__(THREADS)
    order_entries(u8* codes, const i64* addresses, i64 code_page_stride, const i64* destination, int M) {
  const int lane = threadIdx.x % 32, set = threadIdx.x / 32, at = blockIdx.x * 32 + lane;
  const Kv kv = blockIdx.z % 2 ? VALUE : KEY;
  if (addresses) codes = reinterpret_cast<u8*>(addresses[blockIdx.z / 2 * COLUMNS + CODE_PAGES_COLUMN]);
  if (set >= kv.sets) return;
  const i64 to = at < M ? destination[at] : -1;
  u32 ends = __ballot_sync(EVERY_LANE, to >= P && to % SPAN_TOKENS == SPAN_TOKENS - 1);
  const int first = kv.step == 1 ? set * (SPAN_TOKENS / kv.sets) : set;
  for (int which = 0; which < 32; ++which) {
    if (!(ends >> which & 1)) continue;
    const i64 slot = destination[blockIdx.x * 32 + which] - (SPAN_TOKENS - 1) + first;
    order_set(kv, codes + slot / P * code_page_stride + i64(blockIdx.y) * HEAD_BYTES, u32(slot % P));
  }
}
