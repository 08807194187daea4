// What `cluster_omp.cu` asks of the device, in PTX; `clusters.py` puts the two files together. Tests that run the kernel on
// a CPU bring the same functions (tests/kernels/cuda_on_cpu.h).
//
// Macro HALF: 1 if numbers of 16 bits are float16, 0 if they are bfloat16.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define SHARED_MEMORY(name) extern __shared__ __align__(128) u8 name[]

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// All threads of the cluster meet; what they wrote to any block's shared memory before is seen by all after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

__device__ __forceinline__ u32 local_address(const void* local) {
  return static_cast<u32>(__cvta_generic_to_shared(local));
}

__device__ __forceinline__ u32 remote_address(const void* local, u32 rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(local_address(local)), "r"(rank));
  return address;
}

// Store to another block's memory, at the offset that `to` has in this one's; its bytes count there at `arrival`.
__device__ __forceinline__ void send(const void* to, u64* arrival, u32 rank, u32 value) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                   remote_address(to, rank)),
               "r"(value), "r"(remote_address(arrival, rank))
               : "memory");
}

__device__ __forceinline__ void send(const void* to, u64* arrival, u32 rank, uint2 value) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                   remote_address(to, rank)),
               "r"(value.x), "r"(value.y), "r"(remote_address(arrival, rank))
               : "memory");
}

__device__ __forceinline__ void make_arrival(u64* arrival) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(local_address(arrival)) : "memory");
}

__device__ __forceinline__ void publish_arrivals() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Say how many bytes complete the next phase; by one thread a phase.
__device__ __forceinline__ void expect(u64* arrival, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(local_address(arrival)), "r"(bytes)
               : "memory");
}

// Whether a phase is complete, the first one of parity 0; then what was sent can be read. All lanes of a warp ask. The
// scope is the block, as in CUTLASS's barriers for stores of other blocks: a wider one would empty the L1 cache.
__device__ __forceinline__ bool arrived(u64* arrival, u32 parity) {
  u32 complete;
  asm volatile(
      "{.reg .pred complete;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.b32 %0, 1, 0, complete;}"
      : "=r"(complete)
      : "r"(local_address(arrival)), "r"(parity)
      : "memory");
  return __all_sync(0xFFFFFFFFu, complete);
}

// sums = rows [16, 16] times columns [16, 8], plus `to`.
__device__ __forceinline__ void multiply(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1, const float (&to)[4]) {
#if HALF
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
#else
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
#endif
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
      : "=f"(sums[0]), "=f"(sums[1]), "=f"(sums[2]), "=f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(to[0]), "f"(to[1]), "f"(to[2]), "f"(to[3]));
}

// Two numbers in the dictionary's precision, the first in the low bits; and back.
__device__ __forceinline__ u32 pack(float first, float second) {
  u32 pair;
#if HALF
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#else
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
#endif
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
