// `multiply_bins` as a function that Python can call; built with the kernel's macros and SOURCE, the path of its text
// without lookup_primitives.cu.
#include "lookup_on_cpu.h"

#include SOURCE

extern "C" void launch(int x, int y, unsigned shared_bytes, const int4* schedule, const char* bins, const float* stats,
                       const u16* atoms, i64 head_stride, float* chunk_out, int tokens, int max_splits, int heads) {
  cpu::launch({unsigned(x), unsigned(y), 1}, THREADS, 1, shared_bytes, 1, [=] {
    multiply_bins(schedule, bins, stats, atoms, head_stride, chunk_out, tokens, max_splits, heads);
  });
}
