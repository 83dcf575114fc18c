// active_attention on the CPU: a kernel for each instruction set and element type.
#pragma once

#include <stddef.h>

#include "../attention.h"

namespace dsa_rt::cpu {

constexpr int64_t attention_tile_rows = 48;  // query rows of a tile, the unit of work that is split over threads

// Static, as everything that several instruction sets compile: the linker must not merge them.
static inline int64_t attention_tiles(int64_t queries) {
  return (queries + attention_tile_rows - 1) / attention_tile_rows;
}

// Of a head; no tile has queries of two segments.
static inline int64_t attention_tiles(const AttentionParams& p) {
  if (!p.segments) return attention_tiles(p.active);
  int64_t tiles = 0;
  for (int64_t i = 0; i < p.segment_count; ++i) tiles += attention_tiles(p.segments[i].queries);
  return tiles;
}

struct AttentionKernel {
  // Bytes that run() needs for a head dimension, whatever the other sizes; 64-byte alignment.
  size_t (*scratch_bytes)(int64_t dim);
  // Works on the flattened tiles [begin, end) of batch·heads·attention_tiles. A row's result does not depend on the
  // tile or the position it is computed in, so no split over threads, no active set and no segment beside its own
  // changes a bit.
  void (*run)(const ScaledAttentionParams&, void* scratch, int64_t begin, int64_t end);
};

struct AttentionKernels {
  AttentionKernel float32, bfloat16, float16;              // all of one type
  AttentionKernel float32_fp8, bfloat16_fp8, float16_fp8;  // K and V in E4M3
};

extern const AttentionKernels attention_generic;
#if defined(DSA_RT_X86)
extern const AttentionKernels attention_avx2;
extern const AttentionKernels attention_avx512;
#endif
#if defined(DSA_RT_AVX512_BF16)
extern const AttentionKernel attention_avx512_bf16, attention_avx512_bf16_fp8;  // bf16 queries only
#endif

}  // namespace dsa_rt::cpu
