// The transformer ops beside attention on the CPU: a table of kernels for each instruction set.
#pragma once

#include "../layers.h"

namespace dsa_rt::cpu {

// Every kernel computes what it is asked for in one fixed order, so that no split over threads changes a bit. But for
// confidence_pool, whose sums are fused where that exists, all instruction sets have the same bits.
struct LayerKernels {
  // On the flattened rows [begin, end) of batch·active.
  void (*norm_modulate)(const NormModulateParams&, int64_t begin, int64_t end);
  void (*rms_norm)(const RmsNormParams&, int64_t begin, int64_t end);
  void (*qk_norm_rope_store)(const QkNormRopeStoreParams&, int64_t begin, int64_t end);
  // confidence_pool in steps, each after the whole of the one before. query [H, D] takes the keys' weight; scores
  // [B, H, A] are written on the rows [begin, end) of batch·active; become weights for [begin, end) of batch·heads; and
  // the tokens are summed by them on [begin, end) of batch·pool_pieces(width).
  void (*pool_query)(const ConfidencePoolParams&, float* query);
  void (*pool_scores)(const ConfidencePoolParams&, const float* query, float* scores, int64_t begin, int64_t end);
  void (*pool_weights)(const ConfidencePoolParams&, float* scores, int64_t begin, int64_t end);
  void (*pool_tokens)(const ConfidencePoolParams&, const float* weights, int64_t begin, int64_t end);
};

constexpr int64_t pool_channels = 256;  // of a piece
static constexpr int64_t pool_pieces(int64_t width) { return (width + pool_channels - 1) / pool_channels; }

extern const LayerKernels layers_generic;
#if defined(DSA_RT_X86)
extern const LayerKernels layers_avx2;
extern const LayerKernels layers_avx512;
#if defined(DSA_RT_AVX512_BF16)
extern const LayerKernels layers_avx512_bf16;
#endif
#endif

// On the flattened rows [begin, end) of batch·active; the C library's memcpy knows the processor.
void move_rows(const MoveRowsParams&, bool scatter, int64_t begin, int64_t end);

}  // namespace dsa_rt::cpu
