// The primitives of `stream_primitives.cu` on a CPU, on top of `cuda_on_cpu.h`.
#include "cuda_on_cpu.h"

#define ALIGNED_SHARED_MEMORY(name) u8* name = cpu::memory[cpu::current->block].data()

using Address = u32;  // in shared memory
inline Address address_of(const void* shared) {
  return Address(static_cast<const u8*>(shared) - cpu::memory[cpu::current->block].data());
}
inline u64* arrival_at(Address at) { return reinterpret_cast<u64*>(cpu::memory[cpu::current->block].data() + at); }

// mbarriers: bits 0 to 23 are the arrivals still expected, 24 to 47 the bytes, 48 to 62 the arrivals of a phase, 63 the
// parity of the phase under way.
namespace barrier {
inline u64 arrivals(u64 it) { return it & 0xFFFFFF; }
inline u64 bytes(u64 it) { return it >> 24 & 0xFFFFFF; }
inline u64 count(u64 it) { return it >> 48 & 0x7FFF; }
inline u64 make(u64 parity, u64 count, u64 bytes, u64 arrivals) { return parity << 63 | count << 48 | bytes << 24 | arrivals; }
inline void settle(u64& it) {
  if (!arrivals(it) && !bytes(it)) it = make(~it >> 63, count(it), 0, count(it));
}
}  // namespace barrier
inline void make_arrival(Address at, u32 arrivals) { *arrival_at(at) = barrier::make(0, arrivals, 0, arrivals); }
inline void arrive(Address at) {
  u64* it = arrival_at(at);
  if (!barrier::arrivals(*it)) cpu::fail("more arrivals than a phase expects");
  --*it;
  barrier::settle(*it);
}
inline void wait_for(Address at, u32 parity) {
  while (*arrival_at(at) >> 63 == parity) cpu::idle();
}
// Copies arrive when another thread runs: what is read too early is still the old.
struct Copy {
  u8* to;
  const u8* from;
  u32 bytes;
  u64* arrival;
};
inline std::vector<Copy> copies;
inline void finish_copies() {
  for (const Copy& copy : copies) {
    std::memcpy(copy.to, copy.from, copy.bytes);
    *copy.arrival -= u64(copy.bytes) << 24;
    barrier::settle(*copy.arrival);
  }
  copies.clear();
}
inline void start_copy(Address at, const u8* from, u32 bytes, Address arrival) {
  u8* to = cpu::memory[cpu::current->block].data() + at;
  *arrival_at(arrival) += u64(bytes) << 24;
  arrive(arrival);
  std::memset(to, 0x7F, bytes);  // NaNs in e4m3
  copies.push_back({to, from, bytes, arrival_at(arrival)});
  cpu::idle();
  finish_copies();
}

namespace cpu {
inline Meeting groups[64];
}
inline void meet_for_products(u32 group) {
  cpu::groups[group].expected = 128;
  cpu::meet(cpu::groups[group], 20);
}

inline float e4m3_value(u8 bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  const float size = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
  return (bits & 0x7F) == 0x7F ? NAN : bits & 0x80 ? -size : size;
}
inline u32 e4m3_bits(float x) {  // to the nearest, of ties to the even one
  const float size = std::min(std::fabs(x), 448.0f);
  u32 below = 0;
  for (u32 bit = 64; bit; bit /= 2)
    if ((below | bit) < 0x7F && e4m3_value(below | bit) <= size) below |= bit;
  const float under = size - e4m3_value(below), over = below < 0x7E ? e4m3_value(below + 1) - size : INFINITY;
  return below + (over < under || (over == under && below % 2)) | (std::signbit(x) ? 0x80 : 0);
}
inline u32 eight_bits(float first, float second) { return e4m3_bits(first) | e4m3_bits(second) << 8; }

inline u32 half_of(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline u32 operand(Address rows) { return rows >> 4; }
inline void multiply(u32 (&sums)[32], u32 rows_at, u32 chunk_at) {
  const u8* memory = cpu::memory[cpu::current->block].data();
  const u8 *rows = memory + (rows_at << 4), *chunk = memory + (chunk_at << 4);
  static float values[256];
  if (values[1] == 0)
    for (int bits = 0; bits < 256; ++bits) values[bits] = e4m3_value(bits);
  auto number = [](const u8* tile, int row, int at) { return values[tile[row * 128 + ((at / 16 ^ row % 8) << 4) + at % 16]]; };
  const int lane = cpu::current->lane, first = cpu::current->warp % 4 * 16 + lane / 4;
  for (int word = 0; word < 32; ++word) {
    u32 pair = 0;
    for (int i = 0; i < 2; ++i) {
      const int row = first + word % 2 * 8, column = word / 2 * 8 + lane % 4 * 2 + i;
      float sum = 0;
      for (int at = 0; at < 128; ++at) sum += number(rows, row, at) * number(chunk, column, at);
      pair |= half_of(sum) << 16 * i;
    }
    sums[word] = pair;
  }
  cpu::meet(cpu::own_warp().meeting, 21);  // a warp's lanes go on together
}
inline u32 masked_or(u32 bits, u32 mask, u32 piece) { return bits & mask | piece; }
inline u32 larger_pair(u32 a, u32 b) {
  const auto larger = [](u32 x, u32 y) { return u32(u16(std::max<int16_t>(x, y))); };
  return larger(a, b) | larger(a >> 16, b >> 16) << 16;
}
inline u32 __byte_perm(u32 low, u32 high, u32 selector) {
  const u64 bytes = u64(high) << 32 | low;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) result |= u32(bytes >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return result;
}
inline float inverse_root(float x) { return 1 / std::sqrt(x); }

inline void atomicMax(int* to, int value) { *to = std::max(*to, value); }
