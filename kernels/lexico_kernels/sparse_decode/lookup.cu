// Attention of one token over a split of its codes, for query heads that share a KV head, without rebuilding a vector.
//
// Scores: a record's key is scale * sum of level * atom, so its score is scale * sum of level * (q . atom). The
// products q . atom of all heads lie in shared memory, a row of halves per atom: one gather per entry serves all heads.
// Values: weight * scale * level is added to the atom's bin of each head, in fixed point: integer additions in shared
// memory are native and their order does not matter, so results are the same bits every time. What is left for later is
// one product of bins and atoms.
//
// Shared memory is used twice: scores lie where the bins will be, and weights where the lookup was.
//
// A warp's lanes have the tokens of a span, whose records lie word by word: what a warp loads is 128 bytes in a row.
//
// Macros: those of `records.cu` and `lookup_records.cu`, which come before; QUERIES heads of a pass (1 to 8), ROW of the
// lookup (QUERIES up to a power of two), BINNED of them that have bins at a time (below), THREADS, ROUNDS of
// tokens per thread, MIN_BLOCKS per multiprocessor, PASSES over a KV head's codes, KEY_ATOMS, VALUE_ATOMS.
// CAP_BITS, a float's: scores in base 2 are drawn below it; 0: as they are, and `merge` adds the keys' mean to them.
// OVERLAPS is in `lookup_primitives.cu`.
//
// BINNED: where not all heads' bins have room at once, values are read again for the next so many heads.

constexpr int WARPS = THREADS / 32;
constexpr int MAX_PAGES = ROUNDS * THREADS / P + 2;
constexpr int REDUCED = QUERIES + 1;
constexpr int MAX_TOKENS = ROUNDS * THREADS;
constexpr int BINS = BINNED * VALUE_ATOMS;
constexpr int SCORES = QUERIES * MAX_TOKENS;  // as [QUERIES][MAX_TOKENS]
constexpr int LOOKUP_ROWS = KEY_ATOMS > MAX_TOKENS ? KEY_ATOMS : MAX_TOKENS;
constexpr int LOOKUP_BYTES = (LOOKUP_ROWS * ROW * 2 + 15) / 16 * 16;
static_assert(SPAN_TOKENS == 32, "a warp's lanes read the records of a span together");
static_assert(BINNED >= 1 && BINNED <= QUERIES, "some heads have bins");
constexpr float NO_SCORE = -1e30f, LOG2_E = 1.4426950408889634f;
// All weights of a head add up to less than this, and so do the magnitudes in any of its bins, which mulhi halves.
constexpr float FULL_SCALE = 2.1e9f;
constexpr float FULL_LEVEL = 32767;
constexpr float SMALLEST_SUM = 1e-28f;  // keeps FULL_SCALE over it finite; smaller values are still millions of units
constexpr float BIN_TO_HALF = 1.0f / 32768;
constexpr float WEIGHT_BITS = 15;  // weights are halves of at most 2^15, so that small ones are normal numbers
constexpr float WEIGHT_UNIT = 1.0f / 32768;

#if CAP_BITS
// CAP * tanh(score / CAP), of scores in base 2.
__device__ float soft_capped(float score) {
  const float cap = __uint_as_float(CAP_BITS);
  const float size = 1 - 2 / (power_of_two(fabsf(score) * (2 * LOG2_E / cap)) + 1);  // 1 where the power is infinite
  return score < 0 ? -cap * size : cap * size;
}
#endif

// Sums of level times lookup row of a record, for each head.
template <int S>
__device__ void lookup_sums(const Levels& levels, const Record<S>& record, Shared lookup, float (&sum)[QUERIES]) {
  u32 level[S];
  find_levels<S, true>(levels, record, level);
  constexpr int PAIRS = (ROW + 1) / 2;
  u32 acc[2][PAIRS] = {};  // two chains: half the rounding, and half the waiting
#pragma unroll
  for (int i = 0; i < S; i++) {
    const Shared at = lookup + row_offset<2 * ROW, KEY_ATOMS>(entry_of(record, i));
    u32 row[PAIRS];
    load_halves<ROW>(row, at);
#pragma unroll
    for (int p = 0; p < (QUERIES + 1) / 2; p++) acc[i & 1][p] = multiply_add_halves(row[p], level[i], acc[i & 1][p]);
  }
#pragma unroll
  for (int g = 0; g < QUERIES; g++) sum[g] = half_to_float(acc[0][g / 2], g & 1) + half_to_float(acc[1][g / 2], g & 1);
}

// Add weight * level to the bin of each entry's atom, for COUNT heads. bins: [COUNT][VALUE_ATOMS].
template <int S, int COUNT>
__device__ void add_to_bins(const Levels& levels, const Record<S>& record, Shared bins, const int (&weight)[COUNT]) {
  u32 level[S];
  find_levels<S, false>(levels, record, level);
#pragma unroll
  for (int i = 0; i < S; i++) {
    const u32 offset = row_offset<4, VALUE_ATOMS>(entry_of(record, i));
#pragma unroll
    for (int h = 0; h < COUNT; h++) {
      const int amount = __mulhi(weight[h], (int)level[i]);
      add_shared(bins + offset + h * (4 * VALUE_ATOMS), amount);
    }
  }
}

template <bool MAXIMUM, int COUNT>
__device__ void block_reduce(float (&value)[COUNT], float* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    for (int offset = 16; offset; offset >>= 1) {
      const float other = __shfl_xor_sync(~0u, value[i], offset);
      value[i] = MAXIMUM ? fmaxf(value[i], other) : value[i] + other;
    }
    if (lane == 0) scratch[warp * REDUCED + i] = value[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; i++) {
    value[i] = scratch[i];
    for (int w = 1; w < WARPS; w++) {
      const float other = scratch[w * REDUCED + i];
      value[i] = MAXIMUM ? fmaxf(value[i], other) : value[i] + other;
    }
  }
  __syncthreads();
}

// Where the tokens of a split lie.
struct Tokens {
  const char* const* pages;  // this head's codes in each page, in shared memory, from the split's first page on
  int first;                 // position of token 0, counted from the start of its page
  int begin, end;            // tokens of the split; lanes start at a multiple of 32, and those before `begin` idle

  // Counted as `first` is; tokens before the first or behind the last have the first's or the last's.
  __device__ u32 position(int index) const { return first + max(min(index, end - 1), begin); }
};

using KeyRecord = Record<KEY_SPARSITY>;
using ValueRecord = Record<VALUE_SPARSITY>;

__device__ KeyRecord load_key(const Tokens& tokens, int index) {
  const u32 at = tokens.position(index);
  return load_record<KEY_SPARSITY>(tokens.pages[at / P], KEY_ADDRESS, at % P);
}

__device__ ValueRecord load_value(const Tokens& tokens, int index) {
  const u32 at = tokens.position(index);
  return load_record<VALUE_SPARSITY>(tokens.pages[at / P], VALUE_ADDRESS, at % P);
}

// The word with the scale, in its low half.
__device__ u32 load_value_scale(const Tokens& tokens, int index) {
  const u32 at = tokens.position(index);
  return load_word(tokens.pages[at / P], VALUE_ADDRESS, at % P, 0);
}

// A token's weights, as ROW halves.
constexpr int WEIGHT_PAIRS = (ROW + 1) / 2;

__device__ void store_weights(char* row, const u32 (&pair)[WEIGHT_PAIRS]) {
  if constexpr (ROW == 1) *(u16*)row = (u16)pair[0];
  else if constexpr (ROW == 2) *(u32*)row = pair[0];
  else if constexpr (ROW == 4) *(uint2*)row = make_uint2(pair[0], pair[1]);
  else *(uint4*)row = make_uint4(pair[0], pair[1], pair[2], pair[3]);
}

__device__ void load_weights(const char* row, float (&weight)[ROW]) {
  alignas(16) u32 pair[4];
  if constexpr (ROW == 1) pair[0] = *(const u16*)row;
  else if constexpr (ROW == 2) pair[0] = *(const u32*)row;
  else if constexpr (ROW == 4) *(uint2*)pair = *(const uint2*)row;
  else *(uint4*)pair = *(const uint4*)row;
#pragma unroll
  for (int g = 0; g < ROW; g++) weight[g] = half_to_float(pair[g / 2], g & 1);
}

// Scores, in units of `unit`, to weights relative to the largest, and zeros where scores were. total: of the weights as
// they are rounded.
__device__ void make_weights(float* scores, char* weights, const Tokens& tokens, const float (&unit)[QUERIES],
                             const float (&top)[REDUCED], float (&total)[QUERIES]) {
  float largest[QUERIES];  // weight's logarithm
#pragma unroll
  for (int g = 0; g < QUERIES; g++) largest[g] = WEIGHT_BITS - top[g] * unit[g];
#pragma unroll 2
  for (int index = threadIdx.x; index < MAX_TOKENS; index += THREADS) {
    float weight[2 * WEIGHT_PAIRS] = {};
    u32 pair[WEIGHT_PAIRS];
    const bool used = index >= tokens.begin && index < tokens.end;
#pragma unroll
    for (int g = 0; g < QUERIES; g++) {
      if (used) weight[g] = power_of_two(fmaf(scores[g * MAX_TOKENS + index], unit[g], largest[g]));
      scores[g * MAX_TOKENS + index] = 0;
    }
    if (!used) continue;
#pragma unroll
    for (int p = 0; p < WEIGHT_PAIRS; p++) pair[p] = floats_to_halves(weight[2 * p], weight[2 * p + 1]);
#pragma unroll
    for (int g = 0; g < QUERIES; g++) total[g] += half_to_float(pair[g / 2], g & 1);
    store_weights(weights + index * (2 * ROW), pair);
  }
}

// Add a token to the bins of COUNT heads from FIRST on. weight_row: its row of weights.
template <int FIRST, int COUNT>
__device__ void add_token(const Levels& levels, const ValueRecord& record, const char* weight_row,
                          const float (&scale)[QUERIES], Shared bins) {
  float weight[ROW];
  load_weights(weight_row, weight);
  int fixed[COUNT];
#pragma unroll
  for (int h = 0; h < COUNT; h++) {
    fixed[h] = __float2int_rn(weight[FIRST + h] * scale[FIRST + h] * record.scale());
  }
  add_to_bins<VALUE_SPARSITY, COUNT>(levels, record, bins, fixed);
}

constexpr int AT_ONCE = VALUE_ATOMS % 2 ? 1 : 2;  // atoms that a thread stores

// The bins of a split's COUNT heads from FIRST on as halves [QUERIES][VALUE_ATOMS], each worth 32768 units. The null
// atom's is left out: a record may name it many times, so its bin can exceed what FULL_SCALE allows for, and half's
// infinity times its zeros would be NaN.
template <int FIRST, int COUNT>
__device__ void store_bins(const int* bins, char* out) {
#pragma unroll 2
  for (int atom = AT_ONCE * threadIdx.x; atom < VALUE_ATOMS; atom += AT_ONCE * THREADS) {
#pragma unroll
    for (int h = 0; h < COUNT; h++) {
      const int* bin = bins + h * VALUE_ATOMS + atom;
      const float first = atom ? bin[0] * BIN_TO_HALF : 0;
      if constexpr (AT_ONCE == 2) {
        ((u32*)out)[((FIRST + h) * VALUE_ATOMS + atom) / 2] = floats_to_halves(first, bin[1] * BIN_TO_HALF);
      } else {
        ((u16*)out)[(FIRST + h) * VALUE_ATOMS + atom] = (u16)floats_to_halves(first, 0);
      }
    }
  }
}

// Add up all tokens in empty bins and store them, BINNED heads from FIRST on at a time. value: this thread's first.
template <int FIRST>
__device__ void add_values(const Levels& levels, const Tokens& tokens, ValueRecord value, const char* weights,
                           const float (&scale)[QUERIES], int* bins, char* out) {
  constexpr int COUNT = BINNED < QUERIES - FIRST ? BINNED : QUERIES - FIRST;
  const int thread = threadIdx.x;
  const Shared bins_at = shared_address(bins);
#pragma unroll 2
  for (int r = 0; r < ROUNDS; r++) {
    const int index = r * THREADS + thread;
    if (r * THREADS >= tokens.end) break;
    const ValueRecord next = load_value(tokens, index + THREADS);
    if (index >= tokens.begin && index < tokens.end) {
      add_token<FIRST, COUNT>(levels, value, weights + index * (2 * ROW), scale, bins_at);
    }
    value = next;
  }
  __syncthreads();
  store_bins<FIRST, COUNT>(bins, out);
  if constexpr (FIRST + COUNT < QUERIES) {
    value = load_value(tokens, thread);
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < BINS; i += THREADS) bins[i] = 0;
    __syncthreads();
    add_values<FIRST + COUNT>(levels, tokens, value, weights, scale, bins, out);
  }
}

// Start copying a lookup to shared memory; finish_copies waits for this thread's share.
__device__ void start_lookup(char* to, const char* from) {
  constexpr int BYTES = KEY_ATOMS * ROW * 2;
  if constexpr (BYTES % 16 == 0) {
    const Shared address = shared_address(to);
    for (int i = threadIdx.x * 16; i < BYTES; i += THREADS * 16) start_copy(address + i, from + i);
  } else {
    for (int i = threadIdx.x; i < BYTES / 2; i += THREADS) ((u16*)to)[i] = ((const u16*)from)[i];
  }
}

// grid (splits, tokens * passes per token). Per token: schedule int4 (first, end, tokens of a split, splits), request.
// Per token and pass: lookup halves [KEY_ATOMS][ROW]; query_scale [ROW], what a lookup's sum times a key's scale is
// multiplied by for a score in base 2; offset [ROW] of all scores, which only a cap needs here. Per split as well:
// bins_out halves [QUERIES][VALUE_ATOMS]; stats [3][...][ROW]: largest score, sum of weights relative to it, and the
// worth of a unit of bins_out.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attend_codes(const int4* schedule, const int* request, const int* block_table, int block_table_stride,
                 const char* code_pages, long long page_stride, const char* lookup, const float* query_scale,
                 const float* key_levels, const float* value_levels, char* bins_out, float* stats,
                 int passes_per_token
#if CAP_BITS
                 , const float* offset
#endif
                 ) {
  SHARED_MEMORY(memory);
  __shared__ u32 level_words[2][NUM_LEVELS];
  __shared__ float scratch[WARPS * REDUCED];
  __shared__ const char* pages[MAX_PAGES];
  float* const scores = (float*)(memory + LOOKUP_BYTES);
  int* const bins = (int*)scores;

  const int split = blockIdx.x, row = blockIdx.y, token = row / passes_per_token;
  const int thread = threadIdx.x;
  const float key_level = key_levels[thread % NUM_LEVELS], value_level = value_levels[thread % NUM_LEVELS];
  wait_for_previous();  // levels are the dictionaries', which no step writes
  const int4 own = schedule[token];
  const int own_request = request[token];
  if (split >= own.w) return;
  start_lookup(memory, lookup + row * (long long)(KEY_ATOMS * ROW * 2));
  float unit[QUERIES], top[REDUCED];  // of scores in base 2: those of a query are all multiplied with it, later
#pragma unroll
  for (int g = 0; g < QUERIES; g++) unit[g] = query_scale[row * ROW + g], top[g] = NO_SCORE;
  float largest_level = fmaxf(fabsf(value_level), 1e-30f);
#pragma unroll
  for (int by = NUM_LEVELS / 2; by; by /= 2) {
    largest_level = fmaxf(largest_level, __shfl_xor_sync(~0u, largest_level, by));
  }

  const int start = own.x / SPAN_TOKENS * SPAN_TOKENS + split * own.z;  // lanes of a warp have the tokens of a span
  const char* head = code_pages + (row % passes_per_token / PASSES) * (long long)HEAD_BYTES;
  const Tokens tokens{pages, start % P, max(own.x - start, 0), min(own.z, own.y - start)};
  const int* own_pages = block_table + own_request * (long long)block_table_stride + start / P;
#pragma unroll 1
  for (int i = thread; i <= (tokens.first + tokens.end - 1) / P; i += THREADS) {
    pages[i] = head + own_pages[i] * page_stride;
  }
  if (thread < NUM_LEVELS) {
    level_words[0][thread] = floats_to_halves(key_level, key_level);
    level_words[1][thread] = (u32)__float2int_rn(value_level / largest_level * FULL_LEVEL) << 16;
  }
  __syncthreads();
  KeyRecord key = load_key(tokens, thread);
  u32 value_scale = load_value_scale(tokens, thread);
#pragma unroll 1
  for (int i = SCORES + thread; i < BINS; i += THREADS) bins[i] = 0;  // the rest is set to zero when scores are read
  Levels levels;
  keep_levels(levels, level_words[0]);
  finish_copies();
  __syncthreads();

  float& largest_scale = top[QUERIES];  // of the values, found in the same reduction
  largest_scale = 0;
  const Shared lookup_at = shared_address(memory);
#pragma unroll 2
  for (int r = 0; r < ROUNDS; r++) {
    const int index = r * THREADS + thread;
    if (r * THREADS >= tokens.end) break;
    const KeyRecord next = load_key(tokens, index + THREADS);
    const u32 next_scale = load_value_scale(tokens, index + THREADS);
    largest_scale = fmaxf(largest_scale, fabsf(__uint_as_float(value_scale << 16)));
    float sum[QUERIES];
    lookup_sums(levels, key, lookup_at, sum);
#pragma unroll
    for (int g = 0; g < QUERIES; g++) {
      float score = sum[g] * key.scale();  // of no token, that of the first or the last once more
#if CAP_BITS
      score = soft_capped(score * unit[g] + offset[row * ROW + g]);
#endif
      top[g] = fmaxf(top[g], score);
      scores[g * MAX_TOKENS + index] = score;
    }
    key = next;
    value_scale = next_scale;
  }
  ValueRecord value = load_value(tokens, thread);
  block_reduce<true>(top, scratch);
#if CAP_BITS
#pragma unroll
  for (int g = 0; g < QUERIES; g++) unit[g] = 1;  // what is capped is in base 2
#endif

  float total[QUERIES] = {}, scale[QUERIES];
  make_weights(scores, memory, tokens, unit, top, total);
  block_reduce<false>(total, scratch);
#pragma unroll
  for (int g = 0; g < QUERIES; g++) scale[g] = FULL_SCALE / fmaxf(total[g] * largest_scale, SMALLEST_SUM);

  keep_levels(levels, level_words[1]);
  const long long out_row = (long long)row * gridDim.x + split, statistics = (long long)gridDim.y * gridDim.x * ROW;
  trigger_next();
  add_values<0>(levels, tokens, value, memory, scale, bins, bins_out + out_row * (VALUE_ATOMS * QUERIES * 2));
#pragma unroll
  for (int g = 0; g < QUERIES; g++) {
    if (thread != g) continue;
    float* out = stats + out_row * ROW + g;
    out[0] = top[g] * unit[g];
    out[statistics] = total[g] * WEIGHT_UNIT;
    out[2 * statistics] = 65536 / FULL_LEVEL * largest_level * WEIGHT_UNIT / (scale[g] * BIN_TO_HALF);
  }
}
