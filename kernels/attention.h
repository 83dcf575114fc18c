// Arguments of the attention kernels. The host side has checked them.
#pragma once

#include <stdint.h>

#include "element.h"

namespace dsa_rt {

// Rows [B, rows, H, D] with contiguous elements inside a head's row; strides count elements.
struct Heads {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  int64_t head_stride = 0;
};

// A run of queries and the rows they attend to: one range, or two that do not overlap. Empty where begin = end.
struct AttentionSegment {
  int64_t queries;
  int64_t begin[2], end[2];
};

struct AttentionParams {
  Heads out, q, k, v;  // all of `element`
  Element element;
  float* lse;  // [B, H, A] or null, rows contiguous: natural log-sum-exp of the scaled scores
  int64_t lse_batch_stride, lse_head_stride;
  int64_t batch, heads, active, rows, dim;  // active queries attend to rows keys
  const AttentionSegment* segments;         // in host memory; null: one segment, all queries, all rows
  int64_t segment_count;
};

// fp32 numbers [B, N, H], one for each row and head of K or V; heads lie side by side.
struct Scales {
  const float* data = nullptr;
  int64_t batch_stride = 0, row_stride = 0;
};

// Of K and V in E4M3: an element counts as often as the scale of its row and head says. Unused in other types.
struct ScaledAttentionParams : AttentionParams {
  Scales k_scale, v_scale;
};

}  // namespace dsa_rt
