// `order_entries` as a function that Python can call; built with the kernel's macros and SOURCE, the path of its file.
#include "cuda_on_cpu.h"
#include SOURCE

extern "C" void launch(int x, int y, int z, int threads, u8* codes, const i64* places, i64 code_page_stride,
                       const i64* destination, int M) {
  for (int part = 0; part < z; ++part) {
    cpu::grid_z = part;
    cpu::launch({unsigned(x), unsigned(y), 1}, threads, 1, 16, 1, [=] { order_entries(codes, places, code_page_stride, destination, M); });
  }
}
