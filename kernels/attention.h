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

}  // namespace dsa_rt
