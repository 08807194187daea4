// Matching pursuit with the dictionary resident on chip, straight into the code pages: what the kernels of
// `cluster_launch.cu` do with a tile, on the primitives of `cluster_primitives.cu`; `clusters.py` launches them.
//
// A cluster of CLUSTER blocks codes tiles of one head's K or V vectors. Each block keeps 512 atoms in its registers, as
// the stationary operand of tensor-core products. A pass has two halves:
//   correlate  every warp of every block, its 32 atoms with a unit of 32 residuals; its best goes to the vector's owner;
//   solve      one warp a vector, the vectors dealt out to the blocks: the best of all warps joins the chosen atoms,
//              coordinate descent over them, and the new residual goes to every block.
// No barrier parts them. Stores to other blocks count themselves at the receiver (st.async): a vector's owner goes on
// when all bests are there, a warp correlates a unit when its residuals are there, and does whichever it can. That a
// vector's bests are all there also says that nobody reads its old residual any more, so that one buffer is enough.
// Coordinate descent runs on inner products of the chosen atoms, held in shared memory: lane j has atom j's correlation
// with the residual, and a visit costs a shuffle and a multiply-add. It visits what `pursuit.py`'s does.
//
// Macros, from `clusters.macros`: those of `records.cu`, which comes before; D, HALF (1: float16, 0: bfloat16), CLUSTER,
// OWNED (vectors of a tile that a block solves), MAX_S, R, SHARED_BYTES; WARPS, BLOCK_ATOMS, WINDOW (jobs looked through at
// a time), UNIT (vectors that are correlated at a time), DEALT; MAX_ATOMS, and as bits of floats MOST_LOST_BITS and
// BF16_MAX_BITS; columns of addresses (LayerStack.macros); and of keys and values, KEY_ and VALUE_: ATOMS, STRIDE (from
// head to head).

constexpr u32 EVERY_LANE = 0xFFFFFFFFu;
constexpr int THREADS = 32 * WARPS, WARP_ATOMS = BLOCK_ATOMS / WARPS, ROUNDS = WINDOW / THREADS;
static_assert(WARP_ATOMS == 32 && UNIT == 32, "a warp correlates two sixteens of atoms with four eights of vectors");
static_assert(ROUNDS * WARPS == 64, "list_jobs adds two counts per lane");
constexpr int TILE = CLUSTER * OWNED;         // vectors
constexpr int CHUNKS = D / 32;                // of a row; of each chunk a lane has 8 neighbours, 16 bytes
constexpr int LANE_WORDS = D / 64;            // of a row dealt out to 32 lanes in order; two numbers a word
constexpr int ROW_BYTES = 2 * D;
constexpr int PITCH = MAX_S <= 16 ? 17 : 33;  // of inner products; odd, so that columns meet no bank twice
constexpr int STEPS_PADDED = MAX_S <= 16 ? 16 : 32;
constexpr int UNITS = (TILE + UNIT - 1) / UNIT;
constexpr u32 BESTS_BYTES = CLUSTER * WARPS * 4;  // of one vector
// A float that is not negative orders like an integer, and its low bits can hold an atom's number.
constexpr u32 INDEX_BITS = MAX_ATOMS - 1, VALUE_BITS = 0x7FFFFFFF ^ INDEX_BITS;

struct Kv {
  int sparsity, atoms, stride;
  RecordAddress address;
};
constexpr Kv KEY = {KEY_SPARSITY, KEY_ATOMS, KEY_STRIDE, KEY_ADDRESS};
constexpr Kv VALUE = {VALUE_SPARSITY, VALUE_ATOMS, VALUE_STRIDE, VALUE_ADDRESS};

struct alignas(16) Shared {
  u8 residuals[TILE * ROW_BYTES];              // of the whole tile, in the dictionary's precision
  u8 rests[OWNED * 2 * ROW_BYTES];             // what that precision cuts off, in two more pieces
  u8 rows[(OWNED * MAX_S + STEPS_PADDED - MAX_S) * ROW_BYTES];  // chosen atoms; products read whole sixteens
  u32 best[OWNED][CLUSTER * WARPS];            // of every warp of the cluster: |correlation| and atom
  float exact[OWNED][D];                       // residuals
  float gram[OWNED * MAX_S * PITCH + 32];      // of chosen atoms; lanes read past the last row
  float coefficients[OWNED][32];
  int chosen[OWNED][32];
  float norm[OWNED], energy[OWNED];            // of the vector, of its residual at unit length
  u64 residuals_here[UNITS], bests_here[OWNED];  // arrivals of a unit's residuals, of a vector's bests
  int counts[ROUNDS * WARPS];
  u16 list[WINDOW];                            // jobs of the window to be done here
};
static_assert(sizeof(Shared) == SHARED_BYTES, "clusters.py counts other bytes of shared memory");

// Where a byte of a row lies. Two rows that are read at once lie in other halves of the banks.
__device__ __forceinline__ int row_at(int row, int byte) { return row * ROW_BYTES + (byte ^ ((row & 1) << 6)); }

__device__ __forceinline__ uint4 load_chunk(const u8* rows, int row, int chunk, int quarter) {
  return *reinterpret_cast<const uint4*>(rows + row_at(row, 64 * chunk + 16 * quarter));
}

// A row that is dealt out in order: lane l has numbers l * D / 32 and on.
struct Piece {
  u32 words[LANE_WORDS];
};

__device__ __forceinline__ Piece load_piece(const void* from) {
  Piece piece;
#if D == 128
  const uint2 both = *reinterpret_cast<const uint2*>(from);
  piece.words[0] = both.x, piece.words[1] = both.y;
#else
  piece.words[0] = *reinterpret_cast<const u32*>(from);
#endif
  return piece;
}

__device__ __forceinline__ void store_piece(u8* to, const Piece& piece) {
#if D == 128
  *reinterpret_cast<uint2*>(to) = make_uint2(piece.words[0], piece.words[1]);
#else
  *reinterpret_cast<u32*>(to) = piece.words[0];
#endif
}

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7F800000u); }

__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int apart = 16; apart; apart /= 2) x += __shfl_xor_sync(EVERY_LANE, x, apart);
  return x;
}

__device__ __forceinline__ float lane_max(float x) {  // of numbers that are not negative
  return __uint_as_float(__reduce_max_sync(EVERY_LANE, __float_as_uint(x)));
}

// This block's atoms, as the left operand of products: a warp has 32, as two sixteens of rows. Which atom is in which
// row is free, and so is the order of dimensions, if both operands have the same: lane (g, q) has of each 32 dimensions
// eight neighbours of four neighbouring atoms, which it loads 16 bytes at a time.
struct Atoms {
  u32 fragments[2][2 * CHUNKS][4];
};

__device__ __forceinline__ void load_atoms(Atoms& own, const u16* atoms, int count, int first, u32 zero) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int base = first + warp * WARP_ATOMS + lane / 4 * 4;
#pragma unroll
  for (int at = 0; at < 4; ++at)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk) {
      uint4 numbers = make_uint4(0, 0, 0, 0);
      if (base + at < count)
        numbers = *reinterpret_cast<const uint4*>(atoms + i64(base + at) * D + 32 * chunk + 8 * (lane % 4));
      // Products want their four registers side by side, loads theirs. Without an operation between the two, which
      // `zero` is, the compiler keeps the loads' order and moves registers before every product.
      u32 (&even)[4] = own.fragments[at / 2][2 * chunk], (&odd)[4] = own.fragments[at / 2][2 * chunk + 1];
      even[at % 2] = numbers.x ^ zero, even[2 + at % 2] = numbers.y ^ zero;
      odd[at % 2] = numbers.z ^ zero, odd[2 + at % 2] = numbers.w ^ zero;
    }
}

// Correlate this warp's atoms with eight residuals. best: for residuals 2q and 2q + 1, the best of the lane's four atoms.
__device__ __forceinline__ void correlate_eight(const Atoms& own, const u8* residuals, int first, u32 (&best)[2]) {
  const int lane = threadIdx.x % 32;
  float sums[2][4] = {};
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const uint4 b = load_chunk(residuals, first + lane / 4, chunk, lane % 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      multiply(sums[i], own.fragments[i][2 * chunk], b.x, b.y, sums[i]);
      multiply(sums[i], own.fragments[i][2 * chunk + 1], b.z, b.w, sums[i]);
    }
  }
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    best[column] = 0;
#pragma unroll
    for (u32 at = 0; at < 4; ++at) {
      const u32 bits = __float_as_uint(sums[at / 2][at % 2 * 2 + column]);
      best[column] = max(best[column], (bits & VALUE_BITS) | at);
    }
  }
}

// Correlate this warp's atoms with a unit's residuals and send each vector's best to its owner. count: of the tile.
__device__ __forceinline__ void correlate(Shared& s, const Atoms& own, int first, int count, u32 rank) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 number = rank * BLOCK_ATOMS + warp * WARP_ATOMS + lane / 4 * 4;
  u32 best[4][2] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (first + 8 * i < count) {
      correlate_eight(own, s.residuals, first + 8 * i, best[i]);
      best[i][0] |= number, best[i][1] |= number;
    }
  // Lanes that have other atoms of the same residuals halve what they hold until each has one residual.
  const bool high = lane & 16, middle = lane & 8, low = lane & 4;
  u32 half[2][2], last[2];
#pragma unroll
  for (int at = 0; at < 4; ++at) {
    const u32 kept = high ? best[2 + at / 2][at % 2] : best[at / 2][at % 2];
    const u32 given = high ? best[at / 2][at % 2] : best[2 + at / 2][at % 2];
    half[at / 2][at % 2] = max(kept, __shfl_xor_sync(EVERY_LANE, given, 16));
  }
#pragma unroll
  for (int at = 0; at < 2; ++at)
    last[at] = max(middle ? half[1][at] : half[0][at],
                   __shfl_xor_sync(EVERY_LANE, middle ? half[0][at] : half[1][at], 8));
  const u32 winner = max(low ? last[1] : last[0], __shfl_xor_sync(EVERY_LANE, low ? last[0] : last[1], 4));
  const int vector = first + 16 * high + 8 * middle + 2 * (lane % 4) + low, owned = vector / CLUSTER;
  if (vector < count)
    send(&s.best[owned][rank * WARPS + warp], &s.bests_here[owned], vector % CLUSTER, winner);
}

// Send a vector's residual to every block of the cluster.
__device__ __forceinline__ void send_residual(Shared& s, int vector, const Piece& piece) {
  u8* to = s.residuals + row_at(vector, threadIdx.x % 32 * 4 * LANE_WORDS);
#pragma unroll
  for (u32 block = 0; block < CLUSTER; ++block)
#if D == 128
    send(to, &s.residuals_here[vector / UNIT], block, make_uint2(piece.words[0], piece.words[1]));
#else
    send(to, &s.residuals_here[vector / UNIT], block, piece.words[0]);
#endif
}

__device__ __forceinline__ void keep_energy(Shared& s, int owned, const float (&x)[2 * LANE_WORDS]) {
  float energy = 0;
#pragma unroll
  for (int i = 0; i < 2 * LANE_WORDS; ++i) energy += x[i] * x[i];
  energy = lane_sum(energy);
  if (threadIdx.x % 32 == 0) s.energy[owned] = energy;
}

// The residual of one vector, at unit length: keep it, and send what products need to every block of the cluster.
__device__ __forceinline__ void keep_residual(Shared& s, int owned, int vector, const float (&x)[2 * LANE_WORDS]) {
  const int lane = threadIdx.x % 32, byte = lane * 4 * LANE_WORDS;
  Piece piece, rest, last;
#pragma unroll
  for (int i = 0; i < LANE_WORDS; ++i) {
    const float first = x[2 * i], second = x[2 * i + 1];
    float a, b, c, d;
    piece.words[i] = pack(first, second);
    unpack(piece.words[i], a, b);
    rest.words[i] = pack(first - a, second - b);
    unpack(rest.words[i], c, d);
    last.words[i] = pack(first - a - c, second - b - d);
    s.exact[owned][lane * 2 * LANE_WORDS + 2 * i] = first;
    s.exact[owned][lane * 2 * LANE_WORDS + 2 * i + 1] = second;
  }
  send_residual(s, vector, piece);
  store_piece(s.rests + row_at(2 * owned, byte), rest);
  store_piece(s.rests + row_at(2 * owned + 1, byte), last);
  keep_energy(s, owned, x);
}

// Load a vector, centre and stretch it and bring it to unit length; no finite norm or none at all makes it 0.
__device__ __forceinline__ void begin_vector(Shared& s, int owned, int vector, const u16* from, const float* mean,
                                             const float* stretch) {
  const int lane = threadIdx.x % 32;
  const Piece piece = load_piece(from + lane * 2 * LANE_WORDS);
  float x[2 * LANE_WORDS], peak = 0, square = 0;
#pragma unroll
  for (int i = 0; i < LANE_WORDS; ++i) unpack(piece.words[i], x[2 * i], x[2 * i + 1]);
#pragma unroll
  for (int i = 0; i < 2 * LANE_WORDS; ++i) {
    x[i] = (x[i] - mean[lane * 2 * LANE_WORDS + i]) / stretch[lane * 2 * LANE_WORDS + i];
    peak = fmaxf(peak, x[i] == x[i] ? fabsf(x[i]) : infinity());
  }
  peak = lane_max(peak);
  bool usable = peak > 0 && peak < infinity();
#pragma unroll
  for (int i = 0; i < 2 * LANE_WORDS; ++i) {
    x[i] = usable ? x[i] / peak : 0.0f;  // by the peak first: squares must not overflow
    square += x[i] * x[i];
  }
  const float length = usable ? sqrtf(lane_sum(square)) : 1.0f;  // the same in all lanes: usable is
  usable = usable && peak * length < infinity();
#pragma unroll
  for (int i = 0; i < 2 * LANE_WORDS; ++i) x[i] = usable ? x[i] / length : 0.0f;
  s.coefficients[owned][lane] = 0;
  s.chosen[owned][lane] = 0;
  if (lane == 0) {
    s.norm[owned] = usable ? peak * length : 0.0f;
    expect(&s.bests_here[owned], BESTS_BYTES);
  }
  keep_residual(s, owned, vector, x);
}

// Inner products of the chosen atoms, the newest with all and all with the residual: atom j's are in lane j.
__device__ __forceinline__ void inner_products(const Shared& s, int owned, int vector, int step, float& with_newest,
                                               float& with_residual) {
  const int lane = threadIdx.x % 32, row = lane / 4, quarter = lane % 4, base = owned * MAX_S;
  // Columns of the right operand: the newest atom, and the residual in three pieces that add up to float32.
  const int column = row % 4;
  const u8* rows = column == 0 ? s.rows : column == 1 ? s.residuals : s.rests;
  const int at = column == 0 ? base + step : column == 1 ? vector : 2 * owned + column - 2;
  float sums[STEPS_PADDED / 16][2][4] = {};  // in two chains, each half as long
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    const uint4 b = load_chunk(rows, at, chunk, quarter);
#pragma unroll
    for (int i = 0; i < STEPS_PADDED / 16; ++i)
      if (16 * i <= step) {
        const uint4 low = load_chunk(s.rows, base + 16 * i + row, chunk, quarter);
        const uint4 high = load_chunk(s.rows, base + 16 * i + 8 + row, chunk, quarter);
        const u32 even[4] = {low.x, high.x, low.y, high.y}, odd[4] = {low.z, high.z, low.w, high.w};
        multiply(sums[i][0], even, b.x, b.y, sums[i][0]);
        multiply(sums[i][1], odd, b.z, b.w, sums[i][1]);
      }
  }
#pragma unroll
  for (int i = 0; i < STEPS_PADDED / 16; ++i)
    if (16 * i <= step) {
      float products[2], residuals[2];
#pragma unroll
      for (int eight = 0; eight < 2; ++eight) {
        const float even = sums[i][0][2 * eight] + sums[i][1][2 * eight];
        const float odd = sums[i][0][2 * eight + 1] + sums[i][1][2 * eight + 1];
        const float mine = quarter == 0 ? odd : even + odd;
        const float pieces = mine + __shfl_xor_sync(EVERY_LANE, mine, 1);
        products[eight] = __shfl_sync(EVERY_LANE, even, lane % 8 * 4);
        residuals[eight] = __shfl_sync(EVERY_LANE, pieces, lane % 8 * 4);
      }
      if (lane / 16 == i) {
        with_newest = lane & 8 ? products[1] : products[0];
        with_residual = lane & 8 ? residuals[1] : residuals[0];
      }
    }
}

// Sweeps of coordinate descent, newest atom to oldest; returns what lane j's coefficient gains.
__device__ __forceinline__ float descend(const float* gram, int step, int sweeps, float with_residual) {
  const int lane = threadIdx.x % 32;
  float gain = 0;
  for (int sweep = 0; sweep < sweeps; ++sweep)
#pragma unroll 4
    for (int at = step; at >= 0; --at) {
      const float change = __shfl_sync(EVERY_LANE, with_residual, at);
      with_residual -= change * gram[at * PITCH + lane];
      gain += lane == at ? change : 0.0f;
    }
  return gain;
}

// One vector's half of a pass: take the best atom, solve, and hand the new residual on.
__device__ __forceinline__ void solve(Shared& s, const u16* atoms, int owned, int vector, int step, int sparsity,
                                      float min_energy) {
  const int lane = threadIdx.x % 32, byte = lane * 4 * LANE_WORDS, base = owned * MAX_S;
  if (lane == 0 && step + 1 < sparsity) expect(&s.bests_here[owned], BESTS_BYTES);
  if (!(s.energy[owned] > min_energy)) {  // the same in all lanes
    if (step + 1 < sparsity) send_residual(s, vector, load_piece(s.residuals + row_at(vector, byte)));
    return;
  }
  u32 best = 0;
#pragma unroll
  for (int at = 0; at < CLUSTER * WARPS; at += 32)
    if (at + lane < CLUSTER * WARPS) best = max(best, s.best[owned][at + lane]);
  best = __reduce_max_sync(EVERY_LANE, best);
  const int index = best > INDEX_BITS ? best & INDEX_BITS : 0;
  const Piece newest = load_piece(atoms + i64(index) * D + lane * 2 * LANE_WORDS);
  store_piece(s.rows + row_at(base + step, byte), newest);
  if (lane == 0) s.chosen[owned][step] = index;
  __syncwarp();
  float with_newest = 0, with_residual = 0;
  inner_products(s, owned, vector, step, with_newest, with_residual);
  float* gram = s.gram + base * PITCH;
  if (lane <= step) {
    gram[step * PITCH + lane] = with_newest;
    gram[lane * PITCH + step] = with_newest;
  }
  __syncwarp();
  // Few atoms share the vector early on, and one sweep is as good as two; in 64 dimensions atoms are more alike.
  const float gain = descend(gram, step, 128 / D + (2 * step >= sparsity) + step * 8 / D, with_residual);
  s.coefficients[owned][lane] += gain;
  float x[2 * LANE_WORDS];
#pragma unroll
  for (int i = 0; i < 2 * LANE_WORDS; ++i) x[i] = s.exact[owned][lane * 2 * LANE_WORDS + i];
#pragma unroll 4
  for (int at = 0; at <= step; ++at) {
    const float weight = __shfl_sync(EVERY_LANE, gain, at);
    const Piece atom = load_piece(s.rows + row_at(base + at, byte));
#pragma unroll
    for (int i = 0; i < LANE_WORDS; ++i) {
      float first, second;
      unpack(atom.words[i], first, second);
      x[2 * i] -= weight * first;
      x[2 * i + 1] -= weight * second;
    }
  }
  if (step + 1 < sparsity)
    keep_residual(s, owned, vector, x);
  else
    keep_energy(s, owned, x);
}

// All passes over a tile. A warp solves its own vectors as soon as their bests are there and correlates meanwhile.
// parity: of the next phase of the units' residuals (bit u), and of the bests of this warp's vectors (bit 16 + i).
__device__ __forceinline__ void pursue(Shared& s, const Atoms& own, const u16* atoms, int count, u32 rank, int sparsity,
                                       float min_energy, u32& parity) {
  const int warp = threadIdx.x / 32, units = (count + UNIT - 1) / UNIT;
  auto expect_unit = [&](int unit) {
    if (threadIdx.x == 0) expect(&s.residuals_here[unit], min(count - unit * UNIT, UNIT) * ROW_BYTES);
  };
  for (int unit = 0; unit < units; ++unit) expect_unit(unit);
  int step = 0, unit = 0;            // to be correlated next
  int solved = 0, owned = warp;      // passes; the vector to be solved next
  const bool owner = owned * CLUSTER + rank < count;
  while (step < sparsity || (owner && solved < sparsity)) {
    const int bit = 16 + owned / WARPS;
    if (owner && solved < sparsity && arrived(&s.bests_here[owned], parity >> bit & 1)) {
      parity ^= 1u << bit;
      solve(s, atoms, owned, owned * CLUSTER + rank, solved, sparsity, min_energy);
      owned += WARPS;
      if (owned * CLUSTER + rank >= count) owned = warp, ++solved;
    } else if (step < sparsity && arrived(&s.residuals_here[unit], parity >> unit & 1)) {
      parity ^= 1u << unit;
      if (step + 1 < sparsity) expect_unit(unit);
      correlate(s, own, unit * UNIT, count, rank);
      if (++unit == units) unit = 0, ++step;
    }
  }
}

// Quantise and store one vector's record, its scale raised by `gain`; see `reference.encode_vectors`.
__device__ __forceinline__ void write_record(const Shared& s, int owned, const Kv& kv, const float* levels,
                                             float gain, u8* head, int slot) {
  const int lane = threadIdx.x % 32;
  __syncwarp();  // the last residual's energy is there
  const float gain_factor = exp2f(-gain * log2f(1 - fminf(s.energy[owned], __uint_as_float(MOST_LOST_BITS))));
  const float coefficient = s.coefficients[owned][lane] * s.norm[owned];
  const int index = s.chosen[owned][lane];
  const u16 scale = bfloat16_bits(lane_max(fabsf(coefficient)));
  const float peak = __uint_as_float(u32(scale) << 16);
  const bool usable = peak > 0 && peak < infinity();
  const float ratio = usable ? coefficient / peak : 0.0f, own = levels[lane % NUM_LEVELS];
  int level = 0;
#pragma unroll
  for (int i = 0; i < NUM_LEVELS - 1; ++i) {
    const float middle = (__shfl_sync(EVERY_LANE, own, i) + __shfl_sync(EVERY_LANE, own, i + 1)) * 0.5f;
    level += ratio > middle;
  }
  const float value = __shfl_sync(EVERY_LANE, own, level);
  const bool kept = usable && index > 0 && fabsf(ratio - value) < fabsf(ratio);
  const bool any = __ballot_sync(EVERY_LANE, kept) != 0;
  if (lane < kv.sparsity)
    *reinterpret_cast<u16*>(head + halfword_offset(kv.address, slot, lane + 1)) =
        kept ? u16(index << LEVEL_BITS | level) : u16(0);
  if (lane == 0)
    *reinterpret_cast<u16*>(head + halfword_offset(kv.address, slot, 0)) =
        any ? bfloat16_bits(fminf(peak * gain_factor, __uint_as_float(BF16_MAX_BITS))) : u16(0);
}
