// `attend_codes` as a function that Python can call; built with the kernel's macros and SOURCE, the path of its text
// without lookup_primitives.cu, whose functions are here.
#include "cuda_on_cpu.h"

#undef SHARED_MEMORY
#define SHARED_MEMORY(name) char* name = reinterpret_cast<char*>(cpu::memory[0].data())
#define __shared__ static  // blocks run one after another

using Shared = char*;
struct int4 {
  int x, y, z, w;
};

inline Shared shared_address(const void* local) { return static_cast<char*>(const_cast<void*>(local)); }
template <int BYTES>
void load_once(u32* w, const char* at) {
  if (reinterpret_cast<uintptr_t>(at) % BYTES) cpu::fail("a load is not aligned");
  std::memcpy(w, at, BYTES);
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
inline void start_copy(Shared to, const char* from) { std::memcpy(to, from, 16); }
inline void finish_copies() {}
inline void wait_for_previous() {}
inline void trigger_next() {}

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

#include SOURCE

extern "C" void launch(int x, int y, unsigned shared_bytes, const int4* schedule, const int* request,
                       const int* block_table, int block_table_stride, const char* code_pages, i64 page_stride,
                       const char* lookup, const float* query_scale, const float* key_levels,
                       const float* value_levels, char* bins_out, float* stats, int passes_per_token
#if CAP_BITS
                       , const float* offset
#endif
                       ) {
  cpu::launch({unsigned(x), unsigned(y), 1}, THREADS, 1, shared_bytes, 1, [=] {
    attend_codes(schedule, request, block_table, block_table_stride, code_pages, page_stride, lookup, query_scale,
                 key_levels, value_levels, bins_out, stats, passes_per_token
#if CAP_BITS
                 , offset
#endif
                 );
  });
}
