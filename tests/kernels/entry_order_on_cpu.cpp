// `order_entries` as a function that Python can call; built with the kernel's macros and SOURCE, the path of its file.
#include "cuda_on_cpu.h"
#include SOURCE

extern "C" void launch(int x, int y, int z, int threads, u8* codes, const i64* addresses, i64 code_page_stride,
                       const i64* destination, int M) {
  for (int layer_kv = 0; layer_kv < z; ++layer_kv) {
    cpu::grid_z = layer_kv;
    cpu::launch({unsigned(x), unsigned(y), 1}, threads, 1, 16, 1,
                [=] { order_entries(codes, addresses, code_page_stride, destination, M); });
  }
}
