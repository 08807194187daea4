// The kernels around `cluster_omp.cu`: which jobs a cluster does, of which layer, head, and of keys or values.

// List the jobs of a window that this cluster does: of all that are to be coded (`seen` so far), DEALT at a time go to
// the clusters in turn. Returns how many; every block of the cluster makes the same list.
__device__ __forceinline__ int list_jobs(Shared& s, const i64* destination, int window, int M, int clusters, int which,
                                         int& seen) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 coded[ROUNDS];
  __syncthreads();  // the last window's list is done with
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    const int job = window + i * THREADS + threadIdx.x;
    coded[i] = __ballot_sync(EVERY_LANE, job < M && destination[job < M ? job : 0] >= P);
    if (lane == 0) s.counts[i * WARPS + warp] = __popc(coded[i]);
  }
  __syncthreads();
  // Every warp adds all counts up, two per lane.
  const int even = s.counts[2 * lane], both = even + s.counts[2 * lane + 1];
  int upto = both;
#pragma unroll
  for (int apart = 1; apart < 32; apart *= 2) {
    const int before = __shfl_up_sync(EVERY_LANE, upto, apart);
    if (lane >= apart) upto += before;
  }
  // How many of the first `rank` are this cluster's.
  auto own = [&](int rank) {
    const int round = DEALT * clusters;
    return rank / round * DEALT + min(max(rank % round - DEALT * which, 0), DEALT);
  };
#pragma unroll
  for (int i = 0; i < ROUNDS; ++i) {
    const int at = i * WARPS + warp;
    const int before = __shfl_sync(EVERY_LANE, upto - both, at / 2) + (at % 2 ? __shfl_sync(EVERY_LANE, even, at / 2) : 0);
    const int rank = seen + before + __popc(coded[i] & ((1u << lane) - 1));
    if (coded[i] >> lane & 1 && rank / DEALT % clusters == which) s.list[own(rank) - own(seen)] = i * THREADS + threadIdx.x;
  }
  const int total = __shfl_sync(EVERY_LANE, upto, 31), listed = own(seen + total) - own(seen);
  seen += total;
  __syncthreads();
  return listed;
}

// Addresses of a codebook's tensors, from its atoms' on; and how far values' are from keys'.
constexpr int LEVELS = KEY_LEVELS_COLUMN - KEY_ATOMS_COLUMN, MEAN = KEY_MEAN_COLUMN - KEY_ATOMS_COLUMN;
constexpr int STRETCH = KEY_STRETCH_COLUMN - KEY_ATOMS_COLUMN, KV_COLUMNS = VALUE_ATOMS_COLUMN - KEY_ATOMS_COLUMN;
static_assert(VALUE_LEVELS_COLUMN - VALUE_ATOMS_COLUMN == LEVELS && VALUE_MEAN_COLUMN - VALUE_ATOMS_COLUMN == MEAN &&
                  VALUE_STRETCH_COLUMN - VALUE_ATOMS_COLUMN == STRETCH,
              "addresses of values have another order than those of keys");

// Where the K or V vectors of one head are and their records go.
struct Addresses {
  const u16* tokens;  // of the batch
  i64 token_stride;
  const u16* tail;
  i64 tail_page_stride;
  const float *levels, *mean, *stretch;
  float gain;
  u8* codes;
  i64 code_page_stride;
};

// Code the listed jobs of a window. All blocks of the cluster must have met since the last time.
__device__ __forceinline__ void code_listed(Shared& s, const Atoms& own, const u16* atoms, const Addresses& where,
                                            const Kv& kv, const int* source, const i64* destination, int listed,
                                            u32 rank, float min_energy, u32& parity) {
  const int warp = threadIdx.x / 32;
  for (int first = 0; first < listed; first += TILE) {
    const int count = min(listed - first, TILE);
    for (int owned = warp, vector; (vector = owned * CLUSTER + rank) < count; owned += WARPS) {
      const int at = source[s.list[first + vector]], slot = -1 - at;
      const u16* from = at >= 0 ? where.tokens + at * where.token_stride
                                : where.tail + slot / R * where.tail_page_stride + slot % R * 2 * D;
      begin_vector(s, owned, vector, from, where.mean, where.stretch);
    }
    pursue(s, own, atoms, count, rank, kv.sparsity, min_energy, parity);
    for (int owned = warp, vector; (vector = owned * CLUSTER + rank) < count; owned += WARPS) {
      const i64 to = destination[s.list[first + vector]];
      write_record(s, owned, kv, where.levels, where.gain, where.codes + to / P * where.code_page_stride, to % P);
    }
  }
}

__device__ __forceinline__ void make_arrivals(Shared& s) {
  if (threadIdx.x < UNITS) make_arrival(&s.residuals_here[threadIdx.x]);
  if (threadIdx.x < OWNED) make_arrival(&s.bests_here[threadIdx.x]);
  publish_arrivals();
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    cluster_omp(const u16* key, i64 key_stride_t, i64 key_stride_h, const u16* value, i64 value_stride_t,
                i64 value_stride_h, const u16* tail, i64 tail_page_stride, const u16* key_atoms, const float* key_levels,
                const float* key_mean, const float* key_stretch, const u16* value_atoms, const float* value_levels,
                const float* value_mean, const float* value_stretch, u8* codes, i64 code_page_stride, const int* source,
                const i64* destination, int M, float min_energy, float key_gain, float value_gain) {
  SHARED_MEMORY(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  const int head = blockIdx.y / 2, is_value = blockIdx.y % 2;
  const u32 rank = cluster_rank();
  const Kv kv = is_value ? VALUE : KEY;
  const u16* atoms = (is_value ? value_atoms : key_atoms) + i64(head) * kv.stride;
  const Addresses where = {is_value ? value + head * value_stride_h : key + head * key_stride_h,
                           is_value ? value_stride_t : key_stride_t,
                           tail + (head * R * 2 + is_value) * D,
                           tail_page_stride,
                           is_value ? value_levels : key_levels,
                           (is_value ? value_mean : key_mean) + head * D,
                           (is_value ? value_stretch : key_stretch) + head * D,
                           is_value ? value_gain : key_gain,
                           codes + i64(head) * HEAD_BYTES,
                           code_page_stride};
  Atoms own;
  u32 parity = 0;
  bool begun = false;
  int seen = 0;
  for (int window = 0; window < M; window += WINDOW) {
    const int listed = list_jobs(s, destination, window, M, gridDim.x / CLUSTER, blockIdx.x / CLUSTER, seen);
    if (!listed) continue;  // in every block of the cluster
    if (!begun) {
      load_atoms(own, atoms, kv.atoms, rank * BLOCK_ATOMS, M >> 31);
      make_arrivals(s);
      begun = true;
    }
    // Every block can be sent to. After a window too: its last tile may have been small, and who owned nothing of it must
    // not be ahead, since what he sends would count for the phase that others are still in. Tiles of a window never grow.
    cluster_sync();
    code_listed(s, own, atoms, where, kv, source + window, destination + window, listed, rank, min_energy, parity);
  }
}

// All layers' tails, by clusters that take one dictionary after the other. Nothing if more than `most` jobs are to be
// coded: then the job of that number is. A row of `addresses` has those of a layer's tensors, see LayerStack.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
    cluster_omp_layers(const i64* addresses, int dictionaries, int heads, i64 tail_page_stride, i64 code_page_stride,
                       const int* source, const i64* destination, int M, int most, float min_energy,
                       float key_gain, float value_gain) {
  SHARED_MEMORY(memory);
  Shared& s = *reinterpret_cast<Shared*>(memory);
  if (M > most && destination[most] >= P) return;
  const u32 rank = cluster_rank();
  int seen = 0;
  const int listed = list_jobs(s, destination, 0, min(M, most), 1, 0, seen);
  if (!listed) return;  // in every block of the cluster
  make_arrivals(s);
  Atoms own;
  u32 parity = 0;
  for (int at = blockIdx.x / CLUSTER; at < dictionaries; at += gridDim.x / CLUSTER) {
    const int head = at / 2 % heads, is_value = at % 2;
    const Kv kv = is_value ? VALUE : KEY;
    const i64* row = addresses + at / (2 * heads) * COLUMNS;
    const i64* book = row + KEY_ATOMS_COLUMN + KV_COLUMNS * is_value;
    const u16* atoms = reinterpret_cast<const u16*>(book[0]) + i64(head) * kv.stride;
    const Addresses where = {nullptr,
                             0,
                             reinterpret_cast<const u16*>(row[TAIL_PAGES_COLUMN]) + (head * R * 2 + is_value) * D,
                             tail_page_stride,
                             reinterpret_cast<const float*>(book[LEVELS]),
                             reinterpret_cast<const float*>(book[MEAN]) + head * D,
                             reinterpret_cast<const float*>(book[STRETCH]) + head * D,
                             is_value ? value_gain : key_gain,
                             reinterpret_cast<u8*>(row[CODE_PAGES_COLUMN]) + i64(head) * HEAD_BYTES,
                             code_page_stride};
    load_atoms(own, atoms, kv.atoms, rank * BLOCK_ATOMS, M >> 31);
    cluster_sync();  // as between windows of `cluster_omp`
    code_listed(s, own, atoms, where, kv, source, destination, listed, rank, min_energy, parity);
  }
}
