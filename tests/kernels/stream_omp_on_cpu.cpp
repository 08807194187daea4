// The kernel as a function that Python can call; built with its macros and SOURCE, the path of its text.
#include "hopper_on_cpu.h"
#include SOURCE

extern "C" void launch_stream_omp(int x, int y, unsigned seed, const u16* key, i64 key_stride_t, i64 key_stride_h, const u16* value,
                       i64 value_stride_t, i64 value_stride_h, const u16* tail, i64 tail_page_stride,
                       const u8* key_chunks, const u8* key_integers, const float* key_lengths, const float* key_levels,
                       const float* key_mean, const float* key_stretch, const u8* value_chunks, const u8* value_integers,
                       const float* value_lengths, const float* value_levels, const float* value_mean,
                       const float* value_stretch, u8* codes, i64 code_page_stride, const int* source,
                       const i64* destination, int M, float min_energy, float key_gain, float value_gain) {
  cpu::launch({unsigned(x), unsigned(y), 1}, THREADS, 1, SHARED_BYTES, seed, [=] {
    stream_omp(key, key_stride_t, key_stride_h, value, value_stride_t, value_stride_h, tail, tail_page_stride, key_chunks,
               key_integers, key_lengths, key_levels, key_mean, key_stretch, value_chunks, value_integers, value_lengths,
               value_levels, value_mean, value_stretch, codes, code_page_stride, source, destination, M, min_energy,
               key_gain, value_gain);
  });
}

extern "C" void launch_stream_omp_layers(int x, int y, unsigned seed, const i64* addresses, int dictionaries, int heads,
                                         i64 tail_page_stride, i64 code_page_stride, const int* source,
                                         const i64* destination, int M, int fewer, float min_energy, float key_gain,
                                         float value_gain) {
  cpu::launch({unsigned(x), unsigned(y), 1}, THREADS, 1, SHARED_BYTES, seed, [=] {
    stream_omp_layers(addresses, dictionaries, heads, tail_page_stride, code_page_stride, source, destination, M, fewer,
                      min_energy, key_gain, value_gain);
  });
}
