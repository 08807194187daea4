// Puts the entries of records in an order that makes reading them fast; what they say stays the same.
//
// `lookup.cu` gives the tokens of a span to the lanes of a warp, and all lanes read entry i of their records at once. Lanes
// that go to memory in the same cycle and meet in a bank wait for each other. They are a set: of SET neighbours, which
// have SET classes of atoms by their banks, so that nobody waits if each has an atom of another class. For look-ups of
// keys a set has as many lanes as rows fit all banks, for additions of values all lanes.
//
// A position of the records is a matching of tokens with classes, so positions are filled one after another: each class
// once, as long as that can be, then at most twice, the classes of which most are left first. A token that finds no
// class takes one from another that can go elsewhere (an augmenting path; Kuhn, "The Hungarian method for the assignment
// problem", 1955). Most find one at once, when all choose together. One warp orders a span's keys or values, all sets
// side by side; a lane stands for its token, and for the class of its own number.
//
// Macros, from `entry_order.kernel_for`: those of `records.cu`, which comes before; columns of addresses
// (LayerStack.macros); of keys KEY_SET, and KEY_SHIFT: 2^KEY_SHIFT atoms in a row are of one class. Of values all lanes
// are one set, and of two atoms in a row each has a class of its own.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

static_assert(SPAN_TOKENS == 32, "a lane for each token, and ends of spans are found in 32 jobs");
constexpr u32 EVERY_LANE = 0xFFFFFFFF;
constexpr int NONE = -1;
constexpr int ROUNDS = 3;  // in which all tokens choose together

// Masks of a set's tokens or classes have a bit for each at its number, as its lane has in the set.
template <int SET>
struct Lanes {
  int own = threadIdx.x % SET;
  int first = threadIdx.x % 32 - own;  // lane of the set's token 0

  __device__ u32 vote(bool yes) const { return __ballot_sync(EVERY_LANE, yes) >> first & EVERY_LANE >> (32 - SET); }
  template <class T>
  __device__ T from(int number, T value) const { return __shfl_sync(EVERY_LANE, value, first + number); }
  __device__ int sum(int value) const {
    for (int by = 1; by < SET; by *= 2) value += __shfl_xor_sync(EVERY_LANE, value, by);
    return value;
  }
  __device__ int largest(int value) const {
    for (int by = 1; by < SET; by *= 2) value = max(value, __shfl_xor_sync(EVERY_LANE, value, by));
    return value;
  }
};

__device__ bool any_lane(bool yes) { return __ballot_sync(EVERY_LANE, yes); }

// The lowest bit of a mask at `from` or later, else of all; 0 of none.
__device__ int pick(u32 mask, int from) {
  const u32 later = mask & ~((1u << from) - 1);
  return mask ? __ffs(later ? later : mask) - 1 : 0;
}

// One position's matching.
template <int SET>
struct Matching {
  Lanes<SET> lanes;
  int rotation;  // where picks begin
  u32 open;      // classes of which this token has an entry left
  int of;        // this token's class, or NONE
  int count;     // tokens of this class
  int need;      // that this class should have, beyond those that it has
  int limit;     // of any class's count
  int rounds;    // in which tokens are still to choose together

  __device__ void begin(int most, int left, int later) {
    of = NONE, count = 0, limit = most, rounds = ROUNDS;
    need = most == 1 ? 0 : min(2, max(0, left - 2 * later));
  }

  // Give one token each to the first class of each set that needs some.
  __device__ void fill_needs(u32 needing) {
    const int own_class = pick(needing, 0);
    const u32 able = lanes.vote(of == NONE && (open >> own_class & 1));
    const int token = pick(able, rotation);
    if (!needing) return;
    if (able && lanes.own == token) of = own_class;
    if (lanes.own == own_class) count += able != 0, need = able ? need - 1 : 0;
  }

  // These tokens choose a class that has room; each class takes the first that chose it.
  __device__ void choose(u32 waiting) {
    if (waiting) rounds--;
    const u32 able = open & lanes.vote(count < limit);
    const bool chooses = (waiting >> lanes.own & 1) && able;
    const int to = pick(able, (lanes.own + rotation) % SET);
    const int target = chooses ? lanes.first + to : 32 + threadIdx.x % 32;  // the lane of the class; nobody else's
    const u32 rivals = __match_any_sync(EVERY_LANE, target);
    const bool taken = chooses && __ffs(rivals) - 1 == threadIdx.x % 32;
    if (taken) of = to;
    count += __reduce_or_sync(EVERY_LANE, taken ? 1u << (target & 31) : 0) >> threadIdx.x % 32 & 1;
  }

  // Find a class for the first token of each set that has none; false for sets where it can have none.
  __device__ bool place(u32 waiting) {
    const int token = pick(waiting, 0);
    const u32 room = lanes.vote(count < limit);
    u32 reached = lanes.from(token, open), searched = 0;
    int parent = token;  // who reached this class
    u32 hit = reached & room;
    while (true) {  // else those who have a reached class may go elsewhere
      const u32 others = lanes.vote(of != NONE && (reached >> (of & 31) & 1)) & ~searched;
      const bool searching = waiting && !hit && others;
      if (!any_lane(searching)) break;
      const int other = pick(others, 0);
      const u32 more = lanes.from(other, open) & ~reached;
      if (!searching) continue;
      if (more >> lanes.own & 1) parent = other;
      searched |= 1u << other, reached |= more, hit = more & room;
    }
    bool moving = waiting && hit;
    int to = pick(hit, rotation);
    if (moving && lanes.own == to) count++;
    while (any_lane(moving)) {
      const int mover = lanes.from(to, parent), old = lanes.from(mover, of);
      if (!moving) continue;
      if (lanes.own == mover) of = to;
      moving = mover != token, to = old & 31;
    }
    return !waiting || hit;
  }
};

// Order the records of a span of a head, whose first token is at `slot`.
template <int S, int SET, int SHIFT>
__device__ void order_span(RecordAddress address, u8* head, u32 slot) {
  const Lanes<SET> lanes;
  const u32 own_slot = slot + threadIdx.x % 32;
  const auto place_of = [&](int i) { return reinterpret_cast<u16*>(head + halfword_offset(address, own_slot, i + 1)); };
  u32 entry[S];
#pragma unroll
  for (int i = 0; i < S; i++) entry[i] = *place_of(i);
  const auto class_of = [&](u32 each) { return int((each >> LEVEL_BITS >> SHIFT) % SET); };
  int left = 0;  // entries of this lane's class that the set's tokens have left
  for (int c = 0; c < SET; c++) {
    int own = 0;
#pragma unroll
    for (int i = 0; i < S; i++) own += class_of(entry[i]) == c;
    own = lanes.sum(own);
    if (lanes.own == c) left = own;
  }
  u32 placed = 0;      // entries, a bit each
  bool singly = true;  // until a position has shown that no class can be had once by all
  for (int at = 0; at < S; at++) {
    const int later = S - at - 1, most_left = lanes.largest(left);
    Matching<SET> match{lanes, at % SET, 0};
#pragma unroll
    for (int i = 0; i < S; i++) match.open |= placed >> i & 1 ? 0 : 1u << class_of(entry[i]);
    match.begin(singly && most_left - 1 <= 2 * later ? 1 : 2, left, later);
    while (true) {  // sets go on side by side, each at its own step
      const u32 needing = lanes.vote(match.need > 0), waiting = lanes.vote(match.of == NONE);
      if (!any_lane(waiting)) break;
      const bool chooses = !needing && match.rounds > 0, places = !needing && !chooses;
      if (any_lane(needing)) match.fill_needs(needing);
      if (any_lane(chooses)) match.choose(chooses ? waiting : 0);
      if (!any_lane(places) || match.place(places ? waiting : 0)) continue;
      if (match.limit > 1) {
        match.limit++;
      } else {
        singly = false;
        match.begin(2, left, later);
      }
    }
    u32 chosen = 0;
    bool found = false;
#pragma unroll
    for (int i = 0; i < S; i++) {
      if (found || (placed >> i & 1) || class_of(entry[i]) != match.of) continue;
      found = true, chosen = entry[i], placed |= 1u << i;
    }
    *place_of(at) = u16(chosen);
    left -= match.count;
  }
}

// grid (jobs / 32, heads, 2 * layers), one warp each. A span is ordered when the last of its tokens has been coded.
// addresses: of each layer's tensors; or null for the one layer of `codes`.
extern "C" __global__ void __launch_bounds__(32)
    order_entries(u8* codes, const i64* addresses, i64 code_page_stride, const i64* destination, int M) {
  const int at = blockIdx.x * 32 + threadIdx.x;
  if (addresses) codes = reinterpret_cast<u8*>(addresses[blockIdx.z / 2 * COLUMNS + CODE_PAGES_COLUMN]);
  const i64 to = at < M ? destination[at] : -1;
  u32 ends = __ballot_sync(EVERY_LANE, to >= P && to % SPAN_TOKENS == SPAN_TOKENS - 1);
  for (; ends; ends &= ends - 1) {
    const i64 slot = destination[blockIdx.x * 32 + __ffs(ends) - 1] - (SPAN_TOKENS - 1);
    u8* head = codes + slot / P * code_page_stride + i64(blockIdx.y) * HEAD_BYTES;
    if (blockIdx.z % 2) order_span<VALUE_SPARSITY, 32, 0>(VALUE_ADDRESS, head, u32(slot % P));
    else order_span<KEY_SPARSITY, KEY_SET, KEY_SHIFT>(KEY_ADDRESS, head, u32(slot % P));
  }
}
