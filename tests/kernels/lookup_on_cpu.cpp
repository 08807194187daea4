// `attend_codes` as a function that Python can call; built with the kernel's macros and SOURCE, the path of its text
// without lookup_primitives.cu.
#include "lookup_on_cpu.h"

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
