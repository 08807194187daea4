// What `lookup.cu` and `multiply_bins.cu` ask of the device, in PTX; each comes behind this in a translation unit. Tests
// that run them on a CPU bring the same functions (tests/kernels/lookup_on_cpu.h).
//
// Macro OVERLAPS: 1 if the kernel starts before the one before it has ended, and lets the next one start before it has
// itself (`device/overlap.py`); devices before sm_90 cannot.

using u16 = unsigned short;
using u32 = unsigned int;
using Shared = u32;  // an address in shared memory

#define SHARED_MEMORY(name) extern __shared__ __align__(16) char name[]

__device__ Shared shared_address(const void* local) { return (u32)__cvta_generic_to_shared(local); }

// Of global memory that is read once.
__device__ u32 load_word_once(const char* at) {
  u32 word;
  asm("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(at));
  return word;
}

// The same of what a kernel before has written, which may still run when this one starts: never by the read-only path.
__device__ void load_written(u32 (&words)[4], const char* at) {
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "l"(at) : "memory");
}

__device__ u16 load_half_once(const char* at) {
  u16 bits;
  asm("ld.global.nc.u16 %0, [%1];" : "=h"(bits) : "l"(at));
  return bits;
}

__device__ u32 load_shared(Shared at) {
  u32 word;
  asm("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(at));
  return word;
}

// HALVES, a power of two, of shared memory as pairs.
template <int HALVES>
__device__ void load_halves(u32* pair, Shared at) {
  if constexpr (HALVES == 1) {
    u16 one;
    asm("ld.shared.u16 %0, [%1];" : "=h"(one) : "r"(at));
    pair[0] = one;
  } else if constexpr (HALVES == 2) {
    asm("ld.shared.u32 %0, [%1];" : "=r"(pair[0]) : "r"(at));
  } else if constexpr (HALVES == 4) {
    asm("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(pair[0]), "=r"(pair[1]) : "r"(at));
  } else {
    asm("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(pair[0]), "=r"(pair[1]), "=r"(pair[2]), "=r"(pair[3]) : "r"(at));
  }
}

__device__ void add_shared(Shared at, int amount) {
  asm volatile("red.shared.add.s32 [%0], %1;" ::"r"(at), "r"(amount) : "memory");
}

// Start to copy 16 bytes; finish_copies waits for this thread's.
__device__ void start_copy(Shared to, const char* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ void finish_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Wait until the kernels before have ended; what they wrote can be read then.
__device__ void wait_for_previous() {
#if OVERLAPS && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Let the next kernel start as soon as all blocks have come here or ended.
__device__ void trigger_next() {
#if OVERLAPS && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ u32 multiply_add_halves(u32 a, u32 b, u32 c) {
  u32 out;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(a), "r"(b), "r"(c));
  return out;
}

// One half of a pair as both; an instruction that takes the result can select the half itself.
__device__ u32 twice(u32 pair, bool high) {
  u32 out;
  if (high) asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {h, h};}" : "=r"(out) : "r"(pair));
  else asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; mov.b32 %0, {l, l};}" : "=r"(out) : "r"(pair));
  return out;
}

__device__ float half_to_float(u32 pair, int which) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"((u16)(which ? pair >> 16 : pair & 0xffff)));
  return out;
}

__device__ u32 floats_to_halves(float low, float high) {
  u32 out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(high), "f"(low));
  return out;
}

__device__ float power_of_two(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}

// Start copying 16 bytes to shared memory, or set them to zero where there are none.
__device__ void start_copy_or_clear(Shared to, const char* from, bool there) {
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// sums += a . b of 16 x 16 and 16 x 8 halves, as mma.m16n8k16 deals them out to a warp.
__device__ void multiply_halves(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four matrices of 8 x 8 halves as mma takes them; row: the address of 8 halves in a row, of row l % 8 of matrix l / 8 in
// lane l. TURNED: a register has two rows' halves of a column, not two of a row.
template <bool TURNED>
__device__ void load_matrices(u32 (&out)[4], Shared row) {
  if constexpr (TURNED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(row) : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(row) : "memory");
  }
}
