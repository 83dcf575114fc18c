// Arguments of the step family's kernels, the same for CPU and CUDA. The host side has checked them.
#pragma once

#include <stdint.h>

#include "element.h"

namespace dsa_rt {

// Rows [B, N, P] with contiguous elements inside a row; strides count elements.
struct Rows {
  void* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
  Element element = Element::float32;
};

struct PhiloxNormalParams {
  Rows out;
  const int64_t* seeds;   // [B]
  const int64_t* tokens;  // [rows]
  int64_t batch, rows, width;
  uint32_t draw;
};

struct RenoiseParams {
  Rows out, x0;  // x0.data may be null
  Rows x, velocity;
  const int64_t* seeds;   // [B]
  const int64_t* tokens;  // [rows]
  int64_t batch, rows, width;
  float sigma, keep, sigma_next;  // keep = 1 - sigma_next
  uint32_t draw;
};

struct CachedStepParams {
  Rows x, cache, fresh;
  float* score;  // [batch, active] with score_stride between batches, or null
  int64_t score_stride;
  const int64_t* fresh_rows;   // [active]: the row of each fresh one
  const int32_t* fresh_order;  // [active]: its indices in the order of rows, null where they are in order; CPU only
  int64_t batch, rows, active, width;
  float delta_sigma;
};

struct ExitDecisionParams {
  uint8_t* refine;    // [batch]
  float* confidence;  // [batch]
  const void* logit;  // [batch] of logit_element
  Element logit_element;
  const float* threshold;  // [batch]
  int64_t batch;
};

}  // namespace dsa_rt
