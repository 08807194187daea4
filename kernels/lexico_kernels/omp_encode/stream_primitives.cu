// What `stream_omp.cu` asks of the device, in PTX of Hopper; `streams.py` puts the two files together. Tests that run the
// kernel on a CPU bring the same functions (tests/kernels/hopper_on_cpu.h).
//
// Macro HALF: 1 if numbers of 16 bits are float16, 0 if they are bfloat16.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef u32 Address;  // in shared memory

// Tiles of products repeat after 1,024 bytes of shared memory, which is where they have to begin.
#define ALIGNED_SHARED_MEMORY(name)            \
  extern __shared__ __align__(1024) u8 name##_[]; \
  u8* name = name##_ + (-address_of(name##_) & 1023)

__device__ __forceinline__ Address address_of(const void* shared) {
  return static_cast<Address>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void make_arrival(Address arrival, u32 arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(arrival), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void publish_arrivals() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(Address arrival) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(arrival) : "memory");
}

// Wait until a phase is complete, the first one of parity 0.
__device__ __forceinline__ void wait_for(Address arrival, u32 parity) {
  asm volatile(
      "{.reg .pred complete;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;}" ::"r"(arrival),
      "r"(parity)
      : "memory");
}

// Start to copy so many bytes, a multiple of 16, to shared memory; `arrival` completes when they are there.
__device__ __forceinline__ void start_copy(Address to, const u8* from, u32 bytes, Address arrival) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(arrival), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   to),
               "l"(from), "r"(bytes), "r"(arrival)
               : "memory");
}

// The 128 threads of a group of four warps meet; what they wrote to shared memory can be an operand of products after.
__device__ __forceinline__ void meet_for_products(u32 group) {
  asm volatile("fence.proxy.async.shared::cta;\nbar.sync %0, 128;" ::"r"(group + 1) : "memory");
}

// What stands for rows of 128 bytes in products: swizzled, eight of them a tile. A row's bytes 32 k and on are 2 k further.
__device__ __forceinline__ u32 operand(Address rows) { return rows >> 4 | 1 << 16; }

// Products of a group's 64 rows with 128 rows of a chunk, all of 128 numbers in e4m3, added in halves. A thread has of
// rows lane / 4 and that + 8 of its warp's 16, in even and odd words, columns 8 word / 2 + 2 (lane % 4) and the next one.
__device__ __forceinline__ void multiply(u32 (&sums)[32], u32 rows, u32 atoms) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    asm volatile(
        "{.reg .pred add;\n"
        ".reg .b64 a, b;\n"
        "setp.ne.b32 add, %34, 0;\n"
        "mov.b64 a, {%32, 0x40000040};\n"  // 1,024 bytes from tile to tile, swizzled over 128
        "mov.b64 b, {%33, 0x40000040};\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f16.e4m3.e4m3 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,"
        "%31}, a, b, add, 1, 1;}"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3]), "+r"(sums[4]), "+r"(sums[5]),
          "+r"(sums[6]), "+r"(sums[7]), "+r"(sums[8]), "+r"(sums[9]), "+r"(sums[10]), "+r"(sums[11]),
          "+r"(sums[12]), "+r"(sums[13]), "+r"(sums[14]), "+r"(sums[15]), "+r"(sums[16]), "+r"(sums[17]),
          "+r"(sums[18]), "+r"(sums[19]), "+r"(sums[20]), "+r"(sums[21]), "+r"(sums[22]), "+r"(sums[23]),
          "+r"(sums[24]), "+r"(sums[25]), "+r"(sums[26]), "+r"(sums[27]), "+r"(sums[28]), "+r"(sums[29]),
          "+r"(sums[30]), "+r"(sums[31])
        : "r"(rows + 2 * k), "r"(atoms + 2 * k), "r"(k));
  }
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}

// bits & mask | piece, in one instruction.
__device__ __forceinline__ u32 masked_or(u32 bits, u32 mask, u32 piece) {
  u32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(bits), "r"(mask), "r"(piece));
  return result;
}

// Maxima of two int16 at once.
__device__ __forceinline__ u32 larger_pair(u32 a, u32 b) {
  u32 result;
  asm("max.s16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Two numbers in e4m3, the first in the low bits.
__device__ __forceinline__ u32 eight_bits(float first, float second) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
}

__device__ __forceinline__ void unpack(u32 pair, float& first, float& second) {
#if HALF
  asm("{.reg .f16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;}"
      : "=f"(first), "=f"(second)
      : "r"(pair));
#else
  first = __uint_as_float(pair << 16);
  second = __uint_as_float(pair & 0xFFFF0000u);
#endif
}

__device__ __forceinline__ u16 bfloat16_bits(float x) {
  u16 bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  return bits;
}

__device__ __forceinline__ float inverse_root(float x) { return rsqrtf(x); }
