// Runs a CUDA C++ kernel on a CPU, thread by thread, for tests without a GPU: every thread is a coroutine that gives way
// at whatever its warp, block or cluster does together. Which of the threads that can go on does so is random, from a
// seed, so that what a missing barrier breaks has a chance to show. Memory of blocks starts as NaN.
//
// A kernel's source is included after this, without the file of its primitives, whose functions are here.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __cluster_dims__(...)
#define __launch_bounds__(...)

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;
struct uint2 {
  unsigned x, y;
};
struct uint4 {
  unsigned x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using std::max;
using std::min;

namespace cpu {

struct Thread {
  ucontext_t context;  // to start it; later switches go by jumps, which need no call of the system
  jmp_buf place;
  bool started = false;
  std::vector<char> stack;
  unsigned lane, warp, block;  // of the cluster
};

// Threads wait here until all have come.
struct Meeting {
  unsigned expected = 0;
  std::vector<Thread*> waiting;
  int kind = 0;
};

struct Warp {
  Meeting meeting;
  uint32_t in[32][8];
  float sums[32][4];
};

inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline std::vector<Meeting> blocks;
inline Meeting cluster;
inline std::vector<Thread*> ready, idlers;  // who found nothing to do goes on when nobody else can
inline std::vector<std::vector<unsigned char>> memory;
inline Thread* current;
inline jmp_buf scheduler;
inline std::function<void()> body;
inline std::mt19937 dice;

inline void fail(const char* why) {
  std::fprintf(stderr, "cuda_on_cpu: %s\n", why);
  std::abort();
}

// Wait for the others; all must have come for the same reason, or lanes have parted.
inline void meet(Meeting& meeting, int kind) {
  if (meeting.waiting.empty()) meeting.kind = kind;
  if (meeting.kind != kind) fail("threads that should act together do different things");
  meeting.waiting.push_back(current);
  if (meeting.waiting.size() < meeting.expected) {
    if (!_setjmp(current->place)) _longjmp(scheduler, 1);
    return;
  }
  for (Thread* other : meeting.waiting)
    if (other != current) ready.push_back(other);
  meeting.waiting.clear();
}

inline void idle() {
  idlers.push_back(current);
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline Warp& own_warp() { return warps[current->block * (blocks[0].expected / 32) + current->warp]; }

// Every lane's value is known to all after this; call `done` once it has been read.
inline Warp& exchange(uint32_t value, int kind) {
  Warp& warp = own_warp();
  warp.in[current->lane][0] = value;
  meet(warp.meeting, kind);
  return warp;
}
inline void done(Warp& warp) { meet(warp.meeting, 0); }

inline void enter() {
  body();
  current = nullptr;
  _longjmp(scheduler, 1);
}

}  // namespace cpu

struct Index3 {
  unsigned x, y, z;
};
inline Index3 first_block, gridDim;  // of the cluster that runs
namespace cpu {
inline unsigned grid_z;
}
#define threadIdx (Index3{cpu::current->warp * 32 + cpu::current->lane, 0, 0})
#define blockIdx (Index3{first_block.x + cpu::current->block, first_block.y, cpu::grid_z})
#define SHARED_MEMORY(name) unsigned char* name = cpu::memory[cpu::current->block].data()

inline float bits_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
#define __uint_as_float bits_float
#define __float_as_uint float_bits
#define __popc __builtin_popcount
#define __ffs __builtin_ffs

template <class T>
T shuffle(T value, unsigned from, int kind) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  cpu::Warp& warp = cpu::exchange(bits, kind);
  std::memcpy(&value, &warp.in[from][0], 4);
  cpu::done(warp);
  return value;
}
template <class T>
T __shfl_sync(unsigned, T value, int from) { return shuffle(value, from & 31, 1); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) { return shuffle(value, cpu::current->lane ^ mask, 2); }
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  const int from = int(cpu::current->lane) - by;
  return shuffle(value, from < 0 ? cpu::current->lane : from, 3);
}
inline uint32_t __reduce_max_sync(unsigned, uint32_t value) {
  cpu::Warp& warp = cpu::exchange(value, 4);
  for (auto& lane : warp.in) value = max(value, lane[0]);
  cpu::done(warp);
  return value;
}
inline uint32_t __reduce_min_sync(unsigned, uint32_t value) {
  cpu::Warp& warp = cpu::exchange(value, 11);
  for (auto& lane : warp.in) value = min(value, lane[0]);
  cpu::done(warp);
  return value;
}
inline uint32_t __ballot_sync(unsigned, bool value) {
  cpu::Warp& warp = cpu::exchange(value, 5);
  uint32_t votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= warp.in[lane][0] << lane;
  cpu::done(warp);
  return votes;
}
inline uint32_t __reduce_or_sync(unsigned, uint32_t value) {
  cpu::Warp& warp = cpu::exchange(value, 12);
  for (auto& lane : warp.in) value |= lane[0];
  cpu::done(warp);
  return value;
}
inline uint32_t __match_any_sync(unsigned, uint32_t value) {
  cpu::Warp& warp = cpu::exchange(value, 13);
  uint32_t alike = 0;
  for (int lane = 0; lane < 32; ++lane) alike |= uint32_t(warp.in[lane][0] == value) << lane;
  cpu::done(warp);
  return alike;
}
inline void __syncwarp() { cpu::meet(cpu::own_warp().meeting, 6); }
inline void __syncthreads() { cpu::meet(cpu::blocks[cpu::current->block], 7); }
inline void cluster_sync() { cpu::meet(cpu::cluster, 8); }
inline uint32_t cluster_rank() { return cpu::current->block; }

// mbarriers that expect one arrival a phase: bits 0 to 31 are the bytes still expected, modulo 2^32, bit 32 whether they
// were announced, bit 33 the parity of the phase under way.
inline void settle(unsigned long long& barrier) {
  if ((barrier & 0x1FFFFFFFF) == 0x100000000) barrier = (barrier & 0x200000000) ^ 0x200000000;
}
inline void count_bytes(unsigned long long& barrier, uint32_t bytes) {
  barrier = (barrier & 0x300000000) | uint32_t(barrier + bytes);
}
inline void make_arrival(unsigned long long* barrier) { *barrier = 0; }
inline void publish_arrivals() {}
inline void expect(unsigned long long* barrier, uint32_t bytes) {
  if (*barrier & 0x100000000) cpu::fail("a phase is announced twice");
  *barrier |= 0x100000000;
  count_bytes(*barrier, bytes);
  settle(*barrier);
}
inline bool arrived(unsigned long long* barrier, uint32_t parity) {
  cpu::Warp& warp = cpu::exchange((*barrier >> 33) != parity, 10);
  bool all = true;
  for (auto& lane : warp.in) all = all && lane[0];
  cpu::done(warp);
  if (!all) cpu::idle();
  return all;
}

template <class T>
T* in_block(T* local, uint32_t rank) {
  const auto* base = cpu::memory[cpu::current->block].data();
  const size_t offset = reinterpret_cast<const unsigned char*>(local) - base;
  if (rank >= cpu::memory.size() || offset + sizeof(T) > cpu::memory[rank].size()) cpu::fail("not shared memory");
  return reinterpret_cast<T*>(cpu::memory[rank].data() + offset);
}
template <class T>
void send(const void* to, unsigned long long* barrier, uint32_t rank, T value) {
  std::memcpy(in_block(static_cast<T*>(const_cast<void*>(to)), rank), &value, sizeof value);
  count_bytes(*in_block(barrier, rank), -uint32_t(sizeof value));
  settle(*in_block(barrier, rank));
}

inline uint16_t bfloat16_bits(float x) {  // to nearest even; infinities stay, there are no NaNs
  const uint32_t bits = float_bits(x);
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

#if HALF
inline float half_value(uint16_t bits) { return static_cast<float>(*reinterpret_cast<_Float16*>(&bits)); }
inline uint16_t half_bits(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
#else
inline float half_value(uint16_t bits) { return bits_float(uint32_t(bits) << 16); }
inline uint16_t half_bits(float x) { return bfloat16_bits(x); }
#endif
inline uint32_t pack(float first, float second) { return half_bits(first) | uint32_t(half_bits(second)) << 16; }
inline void unpack(uint32_t pair, float& first, float& second) {
  first = half_value(pair), second = half_value(pair >> 16);
}

// mma.m16n8k16 by the PTX manual's fragments.
inline void multiply(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&to)[4]) {
  cpu::Warp& warp = cpu::own_warp();
  const unsigned lane = cpu::current->lane, g = lane / 4, q = lane % 4;
  const uint32_t own[6] = {a[0], a[1], a[2], a[3], b0, b1};
  std::memcpy(warp.in[lane], own, sizeof own);
  cpu::meet(warp.meeting, 9);
  for (int i = 0; i < 4; ++i) {
    const unsigned row = g + 8 * (i / 2), column = 2 * q + i % 2;
    sums[i] = to[i];
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t left = warp.in[row % 8 * 4 + k % 8 / 2][(row / 8) + 2 * (k / 8)];
      const uint32_t right = warp.in[column * 4 + k % 8 / 2][4 + k / 8];
      sums[i] += half_value(left >> 16 * (k % 2)) * half_value(right >> 16 * (k % 2));
    }
  }
  cpu::done(warp);
}

namespace cpu {

// Let the current thread run until it waits or is over.
inline void go_on() {
  if (_setjmp(scheduler)) return;
  if (current->started) _longjmp(current->place, 1);
  current->started = true;
  setcontext(&current->context);
}

// One launch: clusters one after another.
inline void launch(Index3 grid, unsigned threads_of_block, unsigned cluster_blocks, size_t shared_bytes, uint32_t seed,
                   std::function<void()> kernel) {
  body = std::move(kernel), dice.seed(seed), gridDim = grid;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; x += cluster_blocks) {
      first_block = {x, y, 0};
      memory.assign(cluster_blocks, std::vector<unsigned char>(shared_bytes, 0xFF));
      warps.assign(cluster_blocks * threads_of_block / 32, {});
      for (Warp& warp : warps) warp.meeting.expected = 32;
      blocks.assign(cluster_blocks, {});
      for (Meeting& block : blocks) block.expected = threads_of_block;
      cluster = {}, cluster.expected = cluster_blocks * threads_of_block;
      threads = std::vector<Thread>(cluster.expected);
      ready.clear();
      for (unsigned i = 0; i < threads.size(); ++i) {
        Thread& thread = threads[i];
        thread.block = i / threads_of_block, thread.warp = i % threads_of_block / 32, thread.lane = i % 32;
        thread.stack.resize(64 << 10);
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.context, enter, 0);
        ready.push_back(&thread);
      }
      static size_t over;  // not on the stack, where a jump could lose it
      over = 0;
      while (!ready.empty()) {
        const size_t pick = dice() % ready.size();
        std::swap(ready[pick], ready.back());
        current = ready.back();
        ready.pop_back();
        go_on();
        over += current == nullptr;
        if (ready.empty()) ready.swap(idlers);
      }
      if (over != threads.size()) fail("threads wait for others that will not come");
    }
}

}  // namespace cpu
