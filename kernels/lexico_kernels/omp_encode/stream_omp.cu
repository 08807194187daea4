// Matching pursuit of many vectors on Hopper, straight into the code pages: the dictionary streams through shared memory
// past 256 vectors at a time. On the primitives of `stream_primitives.cu`; `streams.py` launches it.
//
// A block codes a tile of one head's K or V vectors, 64 to each of its four groups of four warps. A pass has two halves:
//   correlate  chunks of 256 atoms in e4m3 come from L2, once for all four groups. While one group looks for the largest
//              of its products, the tensor cores have those of the others. Products are added in halves, two numbers in
//              every instruction of the search; the number of an octet of atoms stands in a half's low bits.
//   solve      coordinate descent, as `pursuit.py` does it, on the atoms in 8 bits. Eight lanes have a vector, 16 of its
//              128 numbers each, four vectors after another; a vector's next atom is on its way while the others are done.
// Residuals never leave registers but for their copies in e4m3; the code under way is in shared memory.
//
// Macros, from `streams.macros`: those of `records.cu`, which comes before; HALF (1: tokens are float16, 0: bfloat16),
// MAX_S, R, SHARED_BYTES, STAGES (chunks in flight); as bits of floats MOST_LOST_BITS and BF16_MAX_BITS; of keys and
// values, KEY_ and VALUE_: ATOMS, SHARED (1: all heads have one dictionary); and columns of addresses (LayerStack.macros).

constexpr u32 EVERY_LANE = 0xFFFFFFFFu;
constexpr int D = 128, GROUPS = 4, WARPS = 4 * GROUPS, THREADS = 32 * WARPS;
constexpr int TILE = 64 * GROUPS, PRODUCT = 128, CHUNK = 2 * PRODUCT, CHUNK_BYTES = CHUNK * D;
constexpr int PITCH = MAX_S + 1 | 1;        // odd, so that vectors meet no bank twice
constexpr float RESIDUAL_LENGTH = 64;       // of a residual in e4m3: with atoms of length 256 a sum stays below 65,504
constexpr u32 VALUE_BITS = 0x7FF07FF0;      // of two halves: not the sign, and not the number of one of 16 octets
constexpr float BYTE_ZERO = 8388736.0f;     // 2^23 + 128: a byte of an offset of 128 in the low bits of 2^23

struct Kv {
  int sparsity, atoms, shared;
  RecordAddress address;
};
constexpr Kv KEY = {KEY_SPARSITY, KEY_ATOMS, KEY_SHARED, KEY_ADDRESS};
constexpr Kv VALUE = {VALUE_SPARSITY, VALUE_ATOMS, VALUE_SHARED, VALUE_ADDRESS};

struct Shared {
  u8 chunks[STAGES][CHUNK_BYTES];
  u8 residuals[GROUPS][64 * D];  // in e4m3; rows of 128 bytes, their sixteens swizzled as products want them
  u16 chosen[TILE][MAX_S + 1 & ~1];
  float coefficients[TILE][PITCH];
  float lengths[TILE][PITCH];  // what makes a chosen atom's integers as long as the atom
  float norms[TILE], energies[TILE];
  u64 here[STAGES], done[STAGES];  // arrivals of a chunk's bytes, of the warps that have used it
  int tiles;  // that have something to be coded
};
static_assert(sizeof(Shared) + 1024 <= SHARED_BYTES, "streams.py counts other bytes of shared memory");

__device__ __forceinline__ float infinity() { return __uint_as_float(0x7F800000u); }

// Sums and maxima over the eight lanes of a vector.
__device__ __forceinline__ float sum_of_eight(float x) {
#pragma unroll
  for (int apart = 4; apart; apart /= 2) x += __shfl_xor_sync(EVERY_LANE, x, apart);
  return x;
}

// One sixteen of a vector's numbers, which a lane has.
struct Sixteen {
  float x[16];
};

__device__ __forceinline__ float energy_of(const Sixteen& own) {
  float energy = 0;
#pragma unroll
  for (int i = 0; i < 16; ++i) energy += own.x[i] * own.x[i];
  return sum_of_eight(energy);
}

// Load a vector's sixteen, centre and stretch it and bring the vector to unit length; no finite norm makes it 0.
__device__ __forceinline__ float begin_vector(Sixteen& own, const u16* from, const float* mean, const float* stretch,
                                              bool coded) {
  uint4 halves[2] = {make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)};
  if (coded) {
    halves[0] = reinterpret_cast<const uint4*>(from)[0];
    halves[1] = reinterpret_cast<const uint4*>(from)[1];
  }
  float peak = 0, square = 0;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    unpack(halves[i].x, own.x[8 * i], own.x[8 * i + 1]);
    unpack(halves[i].y, own.x[8 * i + 2], own.x[8 * i + 3]);
    unpack(halves[i].z, own.x[8 * i + 4], own.x[8 * i + 5]);
    unpack(halves[i].w, own.x[8 * i + 6], own.x[8 * i + 7]);
  }
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    own.x[i] = (own.x[i] - mean[i]) / stretch[i];
    peak = fmaxf(peak, own.x[i] == own.x[i] ? fabsf(own.x[i]) : infinity());
  }
#pragma unroll
  for (int apart = 4; apart; apart /= 2) peak = fmaxf(peak, __shfl_xor_sync(EVERY_LANE, peak, apart));
  bool usable = coded && peak > 0 && peak < infinity();
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    own.x[i] = usable ? own.x[i] / peak : 0.0f;  // by the peak first: squares must not overflow
    square += own.x[i] * own.x[i];
  }
  square = sum_of_eight(square);
  const float length = usable ? sqrtf(square) : 1.0f;  // the same in all eight lanes: usable is
  usable = usable && peak * length < infinity();
#pragma unroll
  for (int i = 0; i < 16; ++i) own.x[i] = usable ? own.x[i] / length : 0.0f;
  return usable ? peak * length : 0.0f;
}

// The residual's copy in e4m3, of a length that products can add; 0 if its energy is so small that it takes no atom.
__device__ __forceinline__ void keep_residual(u8* rows, int row, int part, const Sixteen& own, float min_energy) {
  const float energy = energy_of(own);
  const float factor = energy > min_energy ? RESIDUAL_LENGTH * inverse_root(energy) : 0.0f;
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    words[i] = eight_bits(own.x[4 * i] * factor, own.x[4 * i + 1] * factor) |
               eight_bits(own.x[4 * i + 2] * factor, own.x[4 * i + 3] * factor) << 16;
  *reinterpret_cast<uint4*>(rows + row * D + ((part ^ row % 8) << 4)) =
      make_uint4(words[0], words[1], words[2], words[3]);
}

// A block's stream of chunks: of every tile, every pass takes all atoms' once. A chunk is in one of STAGES places, in turn.
struct Stream {
  const u8* from;
  u32 chunks, coming;  // of a pass; not fetched yet, of all passes over this tile
  u32 next;            // to be fetched, of a pass
  u32 stage, parity;   // of the chunk that is used next
  u32 fresh;           // 1: none of this tile was used
};

// Let the stream's next chunk come to such a place; all threads count, and `leader` does it.
__device__ __forceinline__ void fetch(Shared& s, Stream& stream, u32 stage, bool leader) {
  const u8* from = stream.from + stream.next * CHUNK_BYTES;
  if (leader) start_copy(address_of(s.chunks[stage]), from, CHUNK_BYTES, address_of(&s.here[stage]));
  --stream.coming;
  if (++stream.next == stream.chunks) stream.next = 0;
}

// Let a tile's first chunks come, each as soon as everybody has used what was in its place. Of a place that was never used
// a phase before the first counts as complete.
__device__ __forceinline__ void begin_stream(Shared& s, Stream& stream, const u8* from, u32 chunks, int passes) {
  stream.from = from, stream.chunks = chunks, stream.coming = chunks * passes, stream.next = 0, stream.fresh = 1;
  if (threadIdx.x / 32) return;
  for (u32 at = stream.stage; at < stream.stage + STAGES && stream.coming; ++at) {
    wait_for(address_of(&s.done[at % STAGES]), stream.parity ^ u32(at < STAGES));
    fetch(s, stream, at % STAGES, threadIdx.x == 0);
    __syncwarp();
  }
}

// The largest of a thread's products of a row, of even and of odd columns, each with the number of its octet.
__device__ __forceinline__ u32 largest_of(const u32 (&sums)[32], int row, u32 mask) {
  u32 largest[2] = {masked_or(sums[row], mask, 0), masked_or(sums[2 + row], mask, 0x10001)};
#pragma unroll
  for (u32 octet = 2; octet < 16; octet += 2) {
    const u32 low = masked_or(sums[2 * octet + row], mask, octet * 0x10001);
    const u32 high = masked_or(sums[2 * octet + 2 + row], mask, (octet + 1) * 0x10001);
    largest[octet / 2 % 2] = larger_pair(larger_pair(largest[octet / 2 % 2], low), high);
  }
  return larger_pair(largest[0], largest[1]);
}

// Correlate the group's residuals with all atoms. best: the winners of rows lane / 4 and that + 8 of the warp's. mask:
// VALUE_BITS, from a register, so that an octet's number can be a constant in the same instruction.
__device__ __forceinline__ void correlate(Shared& s, Stream& stream, const u8* rows, u32 mask, u32 (&best)[2]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const u32 residuals = operand(address_of(rows)), first = operand(address_of(s.chunks[0]));
  const Address here = address_of(s.here), done = address_of(s.done);
  u32 even[2] = {0, 0}, odd[2] = {0, 0};
#pragma unroll 1
  for (u32 chunk = 0; chunk < stream.chunks; ++chunk) {
    const u32 stage = stream.stage, parity = stream.parity;
    wait_for(here + 8 * stage, parity);
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
      u32 sums[32];
      multiply(sums, residuals, first + stage * (CHUNK_BYTES / 16) + half * (PRODUCT * D / 16));
      if (half && lane == 0) arrive(done + 8 * stage);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const u32 pair = largest_of(sums, row, mask);
        even[row] = max(even[row], __byte_perm(pair, 2 * chunk + half, 0x5104));  // value, octet, product
        odd[row] = max(odd[row], __byte_perm(pair, 2 * chunk + half, 0x5324));
      }
    }
    if (warp == 0 && stream.coming && !stream.fresh) {  // the chunk before: the others have used it, or nearly
      const u32 before = stage ? stage - 1 : STAGES - 1;
      wait_for(done + 8 * before, parity ^ u32(stage == 0));
      fetch(s, stream, before, lane == 0);
      __syncwarp();
    }
    stream.fresh = 0;
    stream.stage = stage + 1 == STAGES ? 0 : stage + 1;
    stream.parity = parity ^ u32(stage + 1 == STAGES);
  }
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const u32 column = lane % 4 * 2;
    best[row] = max(even[row] << 3 | column, odd[row] << 3 | column + 1);
    best[row] = max(best[row], __shfl_xor_sync(EVERY_LANE, best[row], 1));
    best[row] = max(best[row], __shfl_xor_sync(EVERY_LANE, best[row], 2));
  }
}

// The atom that a winner of `correlate` stands for; 0 where all products are 0.
__device__ __forceinline__ int atom_of(u32 best) {
  const u32 column = best & 7, product = best >> 3 & 255, octet = best >> 11 & 15;
  return best >> 15 ? product * PRODUCT + octet * 8 + column : 0;
}

// A lane's sixteen of an atom in 8 bits, as floats.
__device__ __forceinline__ void widen(Sixteen& atom, const uint4& bytes) {
  const u32 words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    const u32 shifted = words[word] ^ 0x80808080u;
    atom.x[4 * word] = __uint_as_float(__byte_perm(shifted, 0x4B000000u, 0x7440)) - BYTE_ZERO;
    atom.x[4 * word + 1] = __uint_as_float(__byte_perm(shifted, 0x4B000000u, 0x7441)) - BYTE_ZERO;
    atom.x[4 * word + 2] = __uint_as_float(__byte_perm(shifted, 0x4B000000u, 0x7442)) - BYTE_ZERO;
    atom.x[4 * word + 3] = __uint_as_float(__byte_perm(shifted, 0x4B000000u, 0x7443)) - BYTE_ZERO;
  }
}

// Coordinate descent of a warp's 16 vectors: sweeps from the newest atom to the oldest.
__device__ __forceinline__ void descend(Shared& s, Sixteen (&own)[4], int first, const u8* atoms, int step, int sweeps) {
  const int lane = threadIdx.x % 32, part = lane % 8, vector = first + lane / 8;
  auto load = [&](int i, int at) {
    return *reinterpret_cast<const uint4*>(atoms + u32(s.chosen[vector + 4 * i][at]) * D + 16 * part);
  };
  uint4 next[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) next[i] = load(i, step);
  int at = step;
#pragma unroll 1
  for (int visit = (step + 1) * sweeps; visit; --visit) {
    const int after = at ? at - 1 : step;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Sixteen atom;
      widen(atom, next[i]);
      if (visit > 1) next[i] = load(i, after);
      float even = 0, odd = 0;
#pragma unroll
      for (int j = 0; j < 16; j += 2) even += atom.x[j] * own[i].x[j], odd += atom.x[j + 1] * own[i].x[j + 1];
      const float length = s.lengths[vector + 4 * i][at], change = sum_of_eight(even + odd) * length;
      const float weight = change * length;
#pragma unroll
      for (int j = 0; j < 16; ++j) own[i].x[j] -= weight * atom.x[j];
      if (part == 0) s.coefficients[vector + 4 * i][at] += change;
    }
    at = after;
  }
}

// Quantise and store two vectors' records, each by 16 lanes; see `reference.encode_vectors`.
__device__ __forceinline__ void write_records(const Shared& s, int vector, const Kv& kv, const float* levels, float gain,
                                              u8* codes, i64 page_stride, i64 slot) {
  const int lane = threadIdx.x % 32, at = lane % 16;
  const bool there = at < kv.sparsity;
  const float gain_factor = exp2f(-gain * log2f(1 - fminf(s.energies[vector], __uint_as_float(MOST_LOST_BITS))));
  const float coefficient = there ? s.coefficients[vector][at] * s.norms[vector] : 0.0f;
  const int index = there ? s.chosen[vector][at] : 0;
  float largest = fabsf(coefficient);
#pragma unroll
  for (int apart = 8; apart; apart /= 2) largest = fmaxf(largest, __shfl_xor_sync(EVERY_LANE, largest, apart));
  const float peak = __uint_as_float(u32(bfloat16_bits(largest)) << 16);
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
  const bool any = (__ballot_sync(EVERY_LANE, kept) >> (lane & 16) & 0xFFFF) != 0;
  if (slot < P) return;  // not to be coded
  u8* head = codes + slot / P * page_stride;
  const int row = slot % P;
  if (there)
    *reinterpret_cast<u16*>(head + halfword_offset(kv.address, row, at + 1)) =
        kept ? u16(index << LEVEL_BITS | level) : u16(0);
  if (at == 0)
    *reinterpret_cast<u16*>(head + halfword_offset(kv.address, row, 0)) =
        any ? bfloat16_bits(fminf(peak * gain_factor, __uint_as_float(BF16_MAX_BITS))) : u16(0);
}

// Where the K or V vectors of one head are, what codes them, and where their records go.
struct Where {
  const u16* tokens;  // of the batch
  i64 token_stride;
  const u16* tail;
  i64 tail_page_stride;
  const u8 *chunks, *integers;
  const float *lengths, *levels, *mean, *stretch;
  float gain;
  u8* codes;
  i64 code_page_stride;
};

// Code a tile's jobs, `count` of them.
__device__ __forceinline__ void code_tile(Shared& s, Stream& stream, const Where& where, const Kv& kv, const int* source,
                                          const i64* destination, int count, float min_energy, u32 mask) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = lane % 8;
  const int group = __shfl_sync(EVERY_LANE, warp / 4, 0);  // the compiler knows by this that lanes have the same
  const int first = 16 * warp, vector = first + lane / 8;  // of the warp; this lane's first
  begin_stream(s, stream, where.chunks, (kv.atoms + CHUNK - 1) / CHUNK, kv.sparsity);
  Sixteen own[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int job = vector + 4 * i;
    const bool coded = job < count && destination[job < count ? job : 0] >= P;
    const int at = coded ? source[job] : 0, slot = -1 - at;
    const u16* from = at >= 0 ? where.tokens + at * where.token_stride
                              : where.tail + slot / R * where.tail_page_stride + slot % R * 2 * D;
    const float norm = begin_vector(own[i], from + 16 * part, where.mean + 16 * part, where.stretch + 16 * part, coded);
    if (part == 0) s.norms[vector + 4 * i] = norm;
  }

#pragma unroll 1
  for (int step = 0; step < kv.sparsity; ++step) {
    u8* rows = s.residuals[group];
    meet_for_products(group);  // nobody reads the old ones any more
#pragma unroll
    for (int i = 0; i < 4; ++i) keep_residual(rows, vector + 4 * i - 64 * group, part, own[i], min_energy);
    meet_for_products(group);
    u32 best[2];
    correlate(s, stream, rows, mask, best);
    if (lane % 4 < 2) {
      const int row = first + lane / 4 + 8 * (lane % 4), index = atom_of(lane % 4 ? best[1] : best[0]);
      s.chosen[row][step] = index;
      s.lengths[row][step] = where.lengths[index];
      s.coefficients[row][step] = 0;
    }
    __syncwarp();
    // What an early sweep leaves the last ones take.
    descend(s, own, first, where.integers, step, 1 + (step + 3 >= kv.sparsity) + step * 8 / D);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float energy = energy_of(own[i]);
    if (part == 0) s.energies[vector + 4 * i] = energy;
  }
  __syncwarp();
#pragma unroll 1
  for (int i = 0; i < 8; ++i) {
    const int job = first + 2 * i + lane / 16;
    write_records(s, job, kv, where.levels, where.gain, where.codes, where.code_page_stride,
                  job < count ? destination[job] : -1);
  }
  __syncwarp();  // the next tile takes the same rows
}

__device__ __forceinline__ void make_arrivals(Shared& s) {
  if (threadIdx.x < STAGES) {
    make_arrival(address_of(&s.here[threadIdx.x]), 1);
    make_arrival(address_of(&s.done[threadIdx.x]), WARPS);
  }
  publish_arrivals();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    stream_omp(const u16* key, i64 key_stride_t, i64 key_stride_h, const u16* value, i64 value_stride_t,
               i64 value_stride_h, const u16* tail, i64 tail_page_stride, const u8* key_chunks, const u8* key_integers,
               const float* key_lengths, const float* key_levels, const float* key_mean, const float* key_stretch,
               const u8* value_chunks, const u8* value_integers, const float* value_lengths, const float* value_levels,
               const float* value_mean, const float* value_stretch, u8* codes, i64 code_page_stride, const int* source,
               const i64* destination, int M, float min_energy, float key_gain, float value_gain) {
  ALIGNED_SHARED_MEMORY(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int head = blockIdx.y / 2, is_value = blockIdx.y % 2, tile = blockIdx.x * TILE, thread = threadIdx.x;
  const Kv kv = is_value ? VALUE : KEY;
  if (thread == 0) s.tiles = 0;
  __syncthreads();
  if (thread < TILE && tile + thread < M && destination[tile + thread] >= P) s.tiles = 1;
  make_arrivals(s);
  __syncthreads();
  if (!s.tiles) return;
  const i64 of_head = kv.shared ? 0 : head;
  const i64 chunk_bytes = i64((kv.atoms + CHUNK - 1) / CHUNK) * CHUNK_BYTES;
  const Where where = {is_value ? value + head * value_stride_h : key + head * key_stride_h,
                       is_value ? value_stride_t : key_stride_t,
                       tail + (head * R * 2 + is_value) * D,
                       tail_page_stride,
                       (is_value ? value_chunks : key_chunks) + of_head * chunk_bytes,
                       (is_value ? value_integers : key_integers) + of_head * kv.atoms * D,
                       (is_value ? value_lengths : key_lengths) + of_head * kv.atoms,
                       is_value ? value_levels : key_levels,
                       (is_value ? value_mean : key_mean) + head * D,
                       (is_value ? value_stretch : key_stretch) + head * D,
                       is_value ? value_gain : key_gain,
                       codes + i64(head) * HEAD_BYTES,
                       code_page_stride};
  Stream stream = {};
  code_tile(s, stream, where, kv, source + tile, destination + tile, M - tile, min_energy, VALUE_BITS ^ u32(M >> 31));
}

// Addresses of a codebook's tensors, from its atoms' on; and how far values' are from keys'.
constexpr int LEVELS = KEY_LEVELS_COLUMN - KEY_ATOMS_COLUMN, MEAN = KEY_MEAN_COLUMN - KEY_ATOMS_COLUMN;
constexpr int STRETCH = KEY_STRETCH_COLUMN - KEY_ATOMS_COLUMN, CHUNKS = KEY_STREAM_ATOMS_COLUMN - KEY_ATOMS_COLUMN;
constexpr int INTEGERS = KEY_INTEGERS_COLUMN - KEY_ATOMS_COLUMN, LENGTHS = KEY_LENGTHS_COLUMN - KEY_ATOMS_COLUMN;
constexpr int KV_COLUMNS = VALUE_ATOMS_COLUMN - KEY_ATOMS_COLUMN;
static_assert(VALUE_LEVELS_COLUMN - VALUE_ATOMS_COLUMN == LEVELS && VALUE_MEAN_COLUMN - VALUE_ATOMS_COLUMN == MEAN &&
                  VALUE_STRETCH_COLUMN - VALUE_ATOMS_COLUMN == STRETCH &&
                  VALUE_STREAM_ATOMS_COLUMN - VALUE_ATOMS_COLUMN == CHUNKS &&
                  VALUE_INTEGERS_COLUMN - VALUE_ATOMS_COLUMN == INTEGERS &&
                  VALUE_LENGTHS_COLUMN - VALUE_ATOMS_COLUMN == LENGTHS,
              "addresses of values have another order than those of keys");

// All layers' tails: blocks take tiles of one dictionary after the other. Nothing if at most `fewer` jobs are to be coded:
// then another launch does. Jobs that are to be coded stand first. A row of `addresses` has those of a layer's tensors, see
// LayerStack.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    stream_omp_layers(const i64* addresses, int dictionaries, int heads, i64 tail_page_stride, i64 code_page_stride,
                      const int* source, const i64* destination, int M, int fewer, float min_energy, float key_gain,
                      float value_gain) {
  ALIGNED_SHARED_MEMORY(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (M <= fewer || destination[fewer] < P) return;
  if (threadIdx.x == 0) s.tiles = 0;
  __syncthreads();
  make_arrivals(s);
  for (int job = threadIdx.x; job < M; job += THREADS)
    if (destination[job] >= P) atomicMax(&s.tiles, job / TILE + 1);
  __syncthreads();
  const int tiles = s.tiles;
  Stream stream = {};
#pragma unroll 1
  for (int at = blockIdx.x; at < dictionaries * tiles; at += gridDim.x) {
    const int dictionary = at / tiles, tile = at % tiles * TILE, head = dictionary / 2 % heads, is_value = dictionary % 2;
    const Kv kv = is_value ? VALUE : KEY;
    const i64* row = addresses + dictionary / (2 * heads) * COLUMNS;
    const i64* book = row + KEY_ATOMS_COLUMN + KV_COLUMNS * is_value;
    const i64 of_head = kv.shared ? 0 : head;
    const i64 chunk_bytes = i64((kv.atoms + CHUNK - 1) / CHUNK) * CHUNK_BYTES;
    const Where where = {nullptr,
                         0,
                         reinterpret_cast<const u16*>(row[TAIL_PAGES_COLUMN]) + (head * R * 2 + is_value) * D,
                         tail_page_stride,
                         reinterpret_cast<const u8*>(book[CHUNKS]) + of_head * chunk_bytes,
                         reinterpret_cast<const u8*>(book[INTEGERS]) + of_head * kv.atoms * D,
                         reinterpret_cast<const float*>(book[LENGTHS]) + of_head * kv.atoms,
                         reinterpret_cast<const float*>(book[LEVELS]),
                         reinterpret_cast<const float*>(book[MEAN]) + head * D,
                         reinterpret_cast<const float*>(book[STRETCH]) + head * D,
                         is_value ? value_gain : key_gain,
                         reinterpret_cast<u8*>(row[CODE_PAGES_COLUMN]) + i64(head) * HEAD_BYTES,
                         code_page_stride};
    code_tile(s, stream, where, kv, source + tile, destination + tile, M - tile, min_energy, VALUE_BITS ^ u32(M >> 31));
  }
}
