// Arguments of quantize_rows. The host side has checked them.
#pragma once

#include <stdint.h>

#include "attention.h"
#include "element.h"

namespace dsa_rt {

// out[b, slots[a]] = rows[b, a] / scale in E4M3, scale[b, slots[a]] = largest |element| of the row and head / 448.
struct QuantizeRowsParams {
  Heads out;                                      // [B, N, H, D] in E4M3
  float* scale;                                   // [B, N, H], contiguous over heads
  int64_t scale_batch_stride, scale_row_stride;
  Heads rows;                                     // [B, A, H, D] of `element`
  Element element;
  const int64_t* slots;                           // [A] distinct rows of out, or null: row a
  int64_t batch, active, heads, dim, all_rows;    // all_rows: N
};

}  // namespace dsa_rt
