// Arguments of the transformer ops' kernels, the same for CPU and CUDA. The host side has checked them.
#pragma once

#include <stdint.h>

#include "attention.h"
#include "element.h"
#include "step.h"

namespace dsa_rt {

// Rows [B, R, C] fp32 of a modulation table; a table of one batch has batch_stride 0.
struct Modulation {
  const float* data = nullptr;
  int64_t batch_stride = 0;
  int64_t row_stride = 0;
};

// sum = x + gate[r]·y, out = LayerNorm(sum)·(1 + scale[r]) + shift[r], r = table_rows[token].
struct NormModulateParams {
  Rows out, x;               // [B, A, C] of one element type
  Rows sum, y;               // data null: no residual, the norm of x
  Modulation gate;           // data null: 1
  Modulation shift, scale;
  const int64_t* table_rows;  // [A] rows of the tables, or null where all have one
  int64_t table_length;       // R; a table of one row beside others has row_stride 0
  int64_t batch, active, width;
  float eps;
  bool streams = false;  // on the CPU: results go past the caches
};

// out = x / √(mean(x²) + eps)·weight; out may be x.
struct RmsNormParams {
  Rows out, x;         // [B, A, C] of one element type
  const void* weight;  // [C] of weight_element
  Element weight_element;
  int64_t batch, active, width;
  float eps;
  bool streams = false;  // on the CPU: results go past the caches
};

// q and k: RMSNorm over C, RoPE per head; k and v into the rows of a cache.
struct QkNormRopeStoreParams {
  Rows q, k, v;               // [B, A, C], C = H·D, of one element type
  Heads q_out;                // [B, A, H, D]
  Heads k_cache, v_cache;     // [B, N, H, D]
  const void *q_weight, *k_weight;  // [C] of weight_element
  Element weight_element;
  const float *cos, *sin;     // [A, D / 2], contiguous
  const int64_t* slots;       // [A] distinct rows of the cache, or null: row a
  int64_t batch, active, heads, dim, cache_rows;
  float eps;
  bool streams = false;  // on the CPU: results go past the caches
};

// out[b, a] = from[b, rows[a]] (gather) or out[b, rows[a]] = from[b, a] (scatter), in bytes.
struct MoveRowsParams {
  void* out;
  const void* from;
  int64_t out_batch_stride, out_row_stride, from_batch_stride, from_row_stride;  // in bytes
  const int64_t* rows;        // [A]
  int64_t batch, active, all_rows, row_bytes;
  bool streams = false;  // on the CPU: results go past the caches
};

// Scores of one query per head over the RMS-normalised keys, softmax, weighted sum of the tokens.
struct ConfidencePoolParams {
  float* out;                 // [B, H, C], contiguous
  const float* query;         // [H, D], contiguous, normalised
  Rows keys, tokens;          // [B, A, C] of one element type
  const void* key_weight;     // [C] of weight_element
  Element weight_element;
  int64_t batch, active, heads, dim;
  float eps;
};

}  // namespace dsa_rt
