// active_attention on the CPU: a kernel for each instruction set and element type.
#pragma once

#include <stddef.h>

#include "../attention.h"

namespace dsa_rt::cpu {

constexpr int64_t attention_tile_rows = 48;  // query rows of a tile, the unit of work that is split over threads

struct AttentionKernel {
  // Bytes that run() needs for a head dimension, whatever the other sizes; 64-byte alignment.
  size_t (*scratch_bytes)(int64_t dim);
  // Works on the flattened tiles [begin, end) of batch·heads·ceil(active / attention_tile_rows). A row's result does
  // not depend on the tile or the position it is computed in, so no split over threads and no active set changes a bit.
  void (*run)(const AttentionParams&, void* scratch, int64_t begin, int64_t end);
};

struct AttentionKernels {
  AttentionKernel float32, bfloat16;
};

extern const AttentionKernels attention_generic;
#if defined(DSA_RT_X86)
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;
#endif
#if defined(DSA_RT_AVX512_BF16)
extern const AttentionKernel attention_avx512_bf16;  // bf16 elements only
#endif

}  // namespace dsa_rt::cpu
