// Merges the bins of a context's splits and multiplies them with the atoms, a share of the atoms at a time.
//
// Nothing here is much work, so what counts is how much is on its way from memory at once: a thread loads eight atoms'
// bins of AT_ONCE splits before it adds up any, and those of the next tile of atoms while this one is multiplied. A
// column is a query head of a token. Columns do not meet, so a token's result is the same in every batch.
//
// Macros: QUERIES heads of a pass, ROW (QUERIES up to a power of two), PASSES over a KV head's codes, ATOMS, DIM of a
// head, COLUMNS of a block (whole tokens), CHUNK atoms of a block, TILE that are multiplied together, PIECE of which a
// thread merges the bins, AT_ONCE splits whose bins it loads, TURNS pieces of each tile for a thread, ATOMS_ARE_HALF: 1,
// or 0 for bfloat16.

constexpr int PIECES = TILE / PIECE;
constexpr int THREADS = COLUMNS * PIECES / TURNS, WARPS = THREADS / 32;
constexpr int PARTS = THREADS / COLUMNS;  // threads that look up what a column's splits are worth
constexpr int ATOM_BYTES = DIM * 2 + 16;  // of a row in shared memory, so that rows start in other banks
constexpr int COLUMN_BYTES = TILE * 2 + 16;
constexpr int ROW_TILES = DIM / 16, OWN_TILES = (ROW_TILES + WARPS - 1) / WARPS, COLUMN_TILES = COLUMNS / 8;
static_assert(COLUMNS % ROW == 0 && COLUMNS % 16 == 0 && CHUNK % TILE == 0 && DIM % 16 == 0, "whole tokens and tiles");
static_assert(PIECE == 8, "16 bytes of halves");
// Bins are up to 2^15 units. Those of all splits of a context are added up and must stay finite as halves.
constexpr float SHRINK = 1.0f / 1024;

// A query head of a token.
struct Column {
  long long first_split;  // counted over all tokens and passes
  int head;               // of the pass
  int splits;             // none where there is no such token or head
};

struct Merged {
  float* worth;  // [splits][COLUMNS], of a unit of each split's bins; in units of the column
  float* unit;   // [COLUMNS]
};

// The worth of each split's bins relative to the column's largest.
__device__ void find_worth(const Merged& merged, const Column& own, const float* tops, const float* units) {
  const int column = threadIdx.x / PARTS, part = threadIdx.x % PARTS;  // all of a column are of one warp
  const long long at = own.first_split * ROW + own.head;
  float top = -1e30f, unit = 0;
  for (int s = part; s < own.splits; s += PARTS) top = fmaxf(top, tops[at + s * ROW]);
#pragma unroll
  for (int by = 1; by < PARTS; by *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
  for (int s = part; s < own.splits; s += PARTS) {
    const float worth = units[at + s * ROW] * power_of_two(tops[at + s * ROW] - top);
    merged.worth[s * COLUMNS + column] = worth;
    unit = fmaxf(unit, worth);
  }
#pragma unroll
  for (int by = 1; by < PARTS; by *= 2) unit = fmaxf(unit, __shfl_xor_sync(~0u, unit, by));
  for (int s = part; s < own.splits; s += PARTS) merged.worth[s * COLUMNS + column] *= SHRINK / (unit > 0 ? unit : 1);
  if (part == 0) merged.unit[column] = unit / SHRINK;
}

// Bins of eight atoms as halves.
struct Bins {
  u32 pair[PIECE / 2];
};

// Of a split, zeros beyond its context's last and beyond the atoms of this block.
__device__ Bins load_bins(const char* bins, const Column& own, int split, int atom, int end) {
  Bins out = {};
  if (split >= own.splits || atom >= end) return out;
  const char* at = bins + (((own.first_split + split) * QUERIES + own.head) * ATOMS + atom) * 2;
  if constexpr (ATOMS % PIECE == 0) {
    load_written(out.pair, at);
  } else {
    for (int i = 0; i < PIECE && atom + i < end; i++) out.pair[i / 2] |= (u32)((const u16*)at)[i] << 16 * (i % 2);
  }
  return out;
}

// Add some splits' bins of a column, from `first` on.
__device__ void add_bins(float (&sum)[PIECE], const Bins (&loaded)[AT_ONCE], const Merged& merged, int column,
                         int first, int splits) {
#pragma unroll
  for (int i = 0; i < AT_ONCE; i++) {
    const float worth = first + i < splits ? merged.worth[(first + i) * COLUMNS + column] : 0;
#pragma unroll
    for (int e = 0; e < PIECE; e++) sum[e] += half_to_float(loaded[i].pair[e / 2], e & 1) * worth;
  }
}

// What a thread merges of each tile: eight atoms of a column, TURNS times.
struct Merger {
  Column own[TURNS];
  Bins loaded[TURNS][AT_ONCE];  // the first splits' of the next tile

  __device__ static int column(int turn) { return (turn * THREADS + threadIdx.x) / PIECES; }
  __device__ static int atom(int first) { return first + threadIdx.x % PIECES * PIECE; }

  // Of the tile that begins at atom `first`, from split `split` on.
  __device__ void load(Bins (&to)[AT_ONCE], const char* bins, int turn, int first, int end, int split = 0) const {
#pragma unroll
    for (int i = 0; i < AT_ONCE; i++) to[i] = load_bins(bins, own[turn], split + i, atom(first), end);
  }
  __device__ void load_tile(const char* bins, int first, int end) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) load(loaded[turn], bins, turn, first, end);
  }

  // What was loaded and all further splits, added up, as halves; columns: [COLUMNS] rows of COLUMN_BYTES.
  __device__ void store_tile(char* columns, const char* bins, int first, int end, const Merged& merged) {
#pragma unroll
    for (int turn = 0; turn < TURNS; turn++) {
      Bins(&some)[AT_ONCE] = loaded[turn];
      float sum[PIECE] = {};
      add_bins(sum, some, merged, column(turn), 0, own[turn].splits);
#pragma unroll 1
      for (int split = AT_ONCE; split < own[turn].splits; split += AT_ONCE) {
        load(some, bins, turn, first, end, split);
        add_bins(sum, some, merged, column(turn), split, own[turn].splits);
      }
      u32* const to = (u32*)(columns + column(turn) * COLUMN_BYTES + threadIdx.x % PIECES * (2 * PIECE));
#pragma unroll
      for (int e = 0; e < PIECE; e += 2) to[e / 2] = floats_to_halves(sum[e], sum[e + 1]);
    }
  }
};

// Start copying a tile of atoms to shared memory; those from `end` on are zeros.
__device__ void start_atoms(Shared to, const u16* atoms, int first, int end) {
  constexpr int IN_ROW = DIM / 8;
  for (int i = threadIdx.x; i < TILE * IN_ROW; i += THREADS) {
    const int atom = i / IN_ROW, at = i % IN_ROW;
    const bool there = first + atom < end;
    const char* from = (const char*)(atoms + (long long)(there ? first + atom : 0) * DIM) + at * 16;
    start_copy_or_clear(to + atom * ATOM_BYTES + at * 16, from, there);
  }
}

// Two numbers of the model's dtype as halves.
__device__ u32 as_halves(u32 pair) {
  if constexpr (ATOMS_ARE_HALF) return pair;
  return floats_to_halves(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
}

// sums += atoms, transposed, times merged bins; atoms: [TILE] rows of ATOM_BYTES, columns: [COLUMNS] of COLUMN_BYTES.
__device__ void multiply_tile(float (&sums)[OWN_TILES][COLUMN_TILES][4], Shared atoms, Shared columns) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, matrix = lane / 8, row = lane % 8;
  const Shared own_atom = atoms + (matrix / 2 * 8 + row) * ATOM_BYTES + matrix % 2 * 16;
  const Shared own_column = columns + (matrix / 2 * 8 + row) * COLUMN_BYTES + matrix % 2 * 16;
#pragma unroll
  for (int k = 0; k < TILE; k += 16) {
    u32 b[COLUMN_TILES / 2][4];
#pragma unroll
    for (int n = 0; n < COLUMN_TILES / 2; n++) load_matrices<false>(b[n], own_column + n * 16 * COLUMN_BYTES + k * 2);
#pragma unroll
    for (int own = 0; own < OWN_TILES; own++) {
      const int tile = warp + own * WARPS;
      if (tile >= ROW_TILES) break;
      u32 a[4];
      load_matrices<true>(a, own_atom + k * ATOM_BYTES + tile * 32);
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = as_halves(a[i]);
#pragma unroll
      for (int n = 0; n < COLUMN_TILES; n++) multiply_halves(sums[own][n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
  }
}

// out: this chunk's [tokens][heads * QUERIES][DIM].
__device__ void store_sums(float* out, const float (&sums)[OWN_TILES][COLUMN_TILES][4], const Merged& merged,
                           int first_column, int tokens, int heads, int pass) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int own = 0; own < OWN_TILES; own++) {
    const int row = (warp + own * WARPS) * 16 + lane / 4;
    if (row >= DIM) break;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = n * 8 + lane % 4 * 2 + i % 2;
        const int token = (first_column + column) / ROW, head = column % ROW;
        if (token >= tokens || head >= QUERIES) continue;
        const long long at = (long long)token * heads * QUERIES + pass * QUERIES + head;
        out[at * DIM + row + i / 2 * 8] = sums[own][n][i] * merged.unit[column];
      }
    }
  }
}

// grid (chunks, passes of a token times blocks of columns). bins halves [tokens][heads][max_splits][QUERIES][ATOMS], as
// `attend_codes` leaves them, with its schedule and stats; heads: passes of a token. atoms [...][ATOMS][DIM], head_stride
// numbers from one KV head's to the next's. chunk_out float [chunks][tokens][heads * QUERIES][DIM], to be added up and
// divided by the sum of weights.
extern "C" __global__ void __launch_bounds__(THREADS)
    multiply_bins(const int4* schedule, const char* bins, const float* stats, const u16* atoms, long long head_stride,
                  float* chunk_out, int tokens, int max_splits, int heads) {
  SHARED_MEMORY(memory);
  constexpr int ATOMS_OF_TILE = TILE * ATOM_BYTES, BINS_OF_TILE = COLUMNS * COLUMN_BYTES;
  char* const columns = memory + 2 * ATOMS_OF_TILE;
  float* const units = (float*)(columns + 2 * BINS_OF_TILE);
  const Merged merged{units + COLUMNS, units};
  const int pass = blockIdx.y % heads, first_column = blockIdx.y / heads * COLUMNS;
  const u16* const own_atoms = atoms + pass / PASSES * head_stride;
  const int begin = blockIdx.x * CHUNK, end = min(begin + CHUNK, ATOMS);
  const Shared atoms_at = shared_address(memory);
  start_atoms(atoms_at, own_atoms, begin, end);
  wait_for_previous();  // atoms are the dictionaries', which no step writes
  const auto column_of = [&](int column) {
    const int token = (first_column + column) / ROW, head = column % ROW;
    const bool there = token < tokens && head < QUERIES;
    return Column{((long long)token * heads + pass) * max_splits, head, there ? schedule[token].w : 0};
  };
  Merger merger;
#pragma unroll
  for (int turn = 0; turn < TURNS; turn++) merger.own[turn] = column_of(merger.column(turn));
  merger.load_tile(bins, begin, end);
  const long long statistics = (long long)tokens * heads * max_splits * ROW;  // of a kind
  find_worth(merged, column_of(threadIdx.x / PARTS), stats, stats + 2 * statistics);
  __syncthreads();

  float sums[OWN_TILES][COLUMN_TILES][4] = {};
#pragma unroll 1
  for (int first = begin, turned = 0; first < end; first += TILE, turned ^= 1) {
    char* const own_columns = columns + turned * BINS_OF_TILE;
    merger.store_tile(own_columns, bins, first, end, merged);
    finish_copies();
    __syncthreads();  // this tile is there, and nobody reads the one before any more
    if (first + TILE < end) {
      start_atoms(atoms_at + (turned ^ 1) * ATOMS_OF_TILE, own_atoms, first + TILE, end);
      merger.load_tile(bins, first + TILE, end);
    }
    multiply_tile(sums, atoms_at + turned * ATOMS_OF_TILE, shared_address(own_columns));
  }
  trigger_next();
  float* const out = chunk_out + (long long)blockIdx.x * tokens * heads * QUERIES * DIM;
  store_sums(out, sums, merged, first_column, tokens, heads, pass);
}
