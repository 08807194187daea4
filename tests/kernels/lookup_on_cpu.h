// The functions of lookup_primitives.cu for kernels that `cuda_on_cpu.h` runs.
#include "cuda_on_cpu.h"

#undef SHARED_MEMORY
#define SHARED_MEMORY(name) char* name = reinterpret_cast<char*>(cpu::memory[0].data())
#define __shared__ static  // blocks run one after another

using Shared = char*;
struct int4 {
  int x, y, z, w;
};

inline Shared shared_address(const void* local) { return static_cast<char*>(const_cast<void*>(local)); }
inline u32 load_word_once(const char* at) {
  if (reinterpret_cast<uintptr_t>(at) % 4) cpu::fail("a load is not aligned");
  u32 word;
  std::memcpy(&word, at, 4);
  return word;
}
inline void load_written(u32 (&words)[4], const char* at) {
  if (reinterpret_cast<uintptr_t>(at) % 16) cpu::fail("a load is not aligned");
  std::memcpy(words, at, 16);
}
inline u16 load_half_once(const char* at) {
  u16 bits;
  std::memcpy(&bits, at, 2);
  return bits;
}
inline u32 load_shared(Shared at) {
  u32 word;
  std::memcpy(&word, at, 4);
  return word;
}
template <int HALVES>
void load_halves(u32* pair, Shared at) {
  pair[0] = 0;
  std::memcpy(pair, at, 2 * HALVES);
}
inline void add_shared(Shared at, int amount) { *reinterpret_cast<u32*>(at) += u32(amount); }  // wraps around
inline void start_copy_or_clear(Shared to, const char* from, bool there) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) cpu::fail("a copy is not aligned");
  there ? std::memcpy(to, from, 16) : std::memset(to, 0, 16);
}
inline void start_copy(Shared to, const char* from) { start_copy_or_clear(to, from, true); }
inline void finish_copies() {}

inline u32 twice(u32 pair, bool high) { return (high ? pair >> 16 : pair & 0xffff) * 0x10001; }
inline float half_to_float(u32 pair, int which) { return half_value(which ? pair >> 16 : pair & 0xffff); }
inline u32 floats_to_halves(float low, float high) { return pack(low, high); }
inline u32 multiply_add_halves(u32 a, u32 b, u32 c) {
  u32 out = 0;
  for (int i = 0; i < 2; ++i) {  // exact in double, rounded once
    const _Float16 sum = static_cast<_Float16>(double(half_to_float(a, i)) * half_to_float(b, i) + half_to_float(c, i));
    u16 bits;
    std::memcpy(&bits, &sum, 2);
    out |= u32(bits) << 16 * i;
  }
  return out;
}
inline float power_of_two(float x) { return exp2f(x); }
inline int __mulhi(int a, int b) { return int((long long)a * b >> 32); }
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return x >= 2147483648.f ? 2147483647 : x <= -2147483648.f ? -2147483647 - 1 : int(lrintf(x));
}
inline u32 __byte_perm(u32 a, u32 b, u32 selector) {
  const u64 both = a | u64(b) << 32;
  u32 out = 0;
  for (int i = 0; i < 4; ++i) out |= u32(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return out;
}

inline void multiply_halves(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  float out[4];
  multiply(out, a, b0, b1, sums);
  std::memcpy(sums, out, sizeof out);
}
template <bool TURNED>
void load_matrices(u32 (&out)[4], Shared row) {
  if (reinterpret_cast<uintptr_t>(row) % 16) cpu::fail("a row is not aligned");
  cpu::Warp& warp = cpu::own_warp();
  const unsigned lane = cpu::current->lane;
  std::memcpy(warp.in[lane], &row, sizeof row);
  cpu::meet(warp.meeting, 14);
  for (unsigned matrix = 0; matrix < 4; matrix++) {
    out[matrix] = 0;
    for (unsigned half = 0; half < 2; half++) {
      const unsigned along = lane % 4 * 2 + half, other = lane / 4;
      Shared from;
      std::memcpy(&from, warp.in[matrix * 8 + (TURNED ? along : other)], sizeof from);
      u16 bits;
      std::memcpy(&bits, from + 2 * (TURNED ? other : along), 2);
      out[matrix] |= u32(bits) << 16 * half;
    }
  }
  cpu::done(warp);
}
inline void wait_for_previous() {}
inline void trigger_next() {}
