// The running softmax of a warpgroup's 64 query rows, in registers: each thread holds two rows' share of the scores
// (layout.cuh), a quad of threads holds a row.
#pragma once

#include <math.h>

#include "layout.cuh"
#include "registers.cuh"

namespace dsa_rt::cuda::hopper {

// Scores of columns `columns` and on take no part: whatever stands there becomes -infinity.
template <int n>
__device__ __forceinline__ void mask(float (&scores)[n], int columns, int thread) {
  const int left = columns - fragment_column(thread);
#pragma unroll
  for (int i = 0; i < n; ++i)
    if (i / 4 * 8 + i % 2 >= left) scores[i] = -INFINITY;
}

struct Softmax {
  float scale;                               // of the scores, times log2 e
  float top[2] = {-INFINITY, -INFINITY};     // the rows' largest score so far, unscaled
  float sum[2] = {0, 0};                     // this thread's share of the sum of 2^(scale * (score - top))

  // What weights of row i (0 or 1) are relative to. A row of nothing but -infinity has weights 0.
  __device__ __forceinline__ float shift(int i) const { return top[i] == -INFINITY ? 0.0f : top[i] * scale; }

  // Turns scores into weights 2^(scale * (score - top)). Earlier sums of weights count `fade` times from here on.
  template <int n>
  __device__ __forceinline__ void update(float (&scores)[n], float (&fade)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float now = top[i];
#pragma unroll
      for (int j = 2 * i; j < n; j += 4) now = fmaxf(now, fmaxf(scores[j], scores[j + 1]));
      now = fmaxf(now, exchange(now, 1));
      now = fmaxf(now, exchange(now, 2));
      const float before = top[i];
      top[i] = now;
      const float shift = this->shift(i);
      fade[i] = exp2_fast(fmaf(before, scale, -shift));
      float even = 0, odd = 0;
#pragma unroll
      for (int j = 2 * i; j < n; j += 4) {
        scores[j] = exp2_fast(fmaf(scores[j], scale, -shift));
        scores[j + 1] = exp2_fast(fmaf(scores[j + 1], scale, -shift));
        even += scores[j];
        odd += scores[j + 1];
      }
      sum[i] = fmaf(sum[i], fade[i], even + odd);
    }
  }

  // The whole sum of row i, in all threads of the quad.
  __device__ __forceinline__ float total(int i) const {
    const float pair = sum[i] + exchange(sum[i], 1);
    return pair + exchange(pair, 2);
  }

  // log sum exp of row i's scaled scores, natural logarithm.
  __device__ __forceinline__ float log_sum_exp(int i, float total) const {
    constexpr float ln2 = 0.693147180559945309f;
    return fmaf(shift(i), ln2, logf(total));
  }
};

}  // namespace dsa_rt::cuda::hopper
