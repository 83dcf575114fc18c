// Queries, scores and weights of attention on E4M3, in registers: queries rounded by a scale of their own, the running
// softmax of scores that carry scales of rows and keys, weights rounded with their values' scales.
#pragma once

#include <math.h>

#include "instructions_fp8.cuh"
#include "registers.cuh"
#include "result.cuh"
#include "softmax.cuh"

namespace dsa_rt::cuda::hopper {

constexpr float code_largest = 448;          // of E4M3
constexpr float weight_largest = 256;        // what the weight 1 becomes for the tile's largest scale of values
constexpr float least_scale = 1.17549435e-38f;  // as of quantize_rows: the smallest normal number

// A row's largest element / 448, at least the smallest normal number; `most` is this thread's share.
__device__ __forceinline__ float scale_of_quad(float most) {
  most = fmaxf(most, exchange(most, 1));
  most = fmaxf(most, exchange(most, 2));
  return fmaxf(most * (1 / code_largest), least_scale);
}

// The thread's fragments of its two query rows in E4M3, and the rows' scales, as quantize_rows defines them up to the
// rounding of 1 / scale and to infinity, which counts for the largest: it becomes NaN all the same (0 times infinity),
// and a row with NaN has no other result. Rows that are no query's become zeros, without a look at memory.
template <int D>
__device__ __forceinline__ void load_queries(uint32_t (&codes)[D / 8], float (&scale)[2], const Heads& q,
                                             const Segment& segment, const QueryTile& tile, int first_row, int thread) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Row row = row_of(segment, tile, first_row + fragment_row(thread) + 8 * i);
    const uint16_t* from = static_cast<const uint16_t*>(q.data) + tile.batch * q.batch_stride +
                           row.query * q.row_stride + tile.head * q.head_stride + 4 * (thread % 4);
    uint2 words[D / 16];
#pragma unroll
    for (int g = 0; g < D / 16; ++g)
      words[g] = row.mine ? *reinterpret_cast<const uint2*>(from + 16 * g) : uint2{0, 0};
    float x[D / 4], most = 0;
#pragma unroll
    for (int g = 0; g < D / 16; ++g) {
      x[4 * g] = low_bf16(words[g].x);
      x[4 * g + 1] = high_bf16(words[g].x);
      x[4 * g + 2] = low_bf16(words[g].y);
      x[4 * g + 3] = high_bf16(words[g].y);
#pragma unroll
      for (int n = 4 * g; n < 4 * g + 4; ++n) most = fmaxf(most, fabsf(x[n]));
    }
    scale[i] = scale_of_quad(most);
    const float factor = reciprocal(scale[i]);
#pragma unroll
    for (int g = 0; g < D / 16; ++g)
      codes[operand_word(g, i)] =
          pack_e4m3(x[4 * g] * factor, x[4 * g + 1] * factor, x[4 * g + 2] * factor, x[4 * g + 3] * factor);
  }
}

// Scores times their keys' scales, which lie by slots.
__device__ __forceinline__ void scale_keys(float (&scores)[tile_keys / 2], const float* scales, int thread) {
#pragma unroll
  for (int g = 0; g < tile_keys / 16; ++g) {
    const float4 of = *reinterpret_cast<const float4*>(scales + 16 * g + 4 * (thread % 4));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scores[weight(g, i, 0)] *= of.x;
      scores[weight(g, i, 1)] *= of.y;
      scores[weight(g, i, 2)] *= of.z;
      scores[weight(g, i, 3)] *= of.w;
    }
  }
}

// softmax.cuh's Softmax, of rows with scales of their own.
struct RowSoftmax {
  float scale[2];                            // of the scores, times log2 e
  float top[2] = {-INFINITY, -INFINITY};     // the rows' largest score so far, unscaled
  float sum[2] = {0, 0};                     // this thread's share of the sum of 2^(scale * (score - top))

  __device__ __forceinline__ float shift(int i) const { return top[i] == -INFINITY ? 0.0f : top[i] * scale[i]; }

  // Takes a tile's scores in: its weights, unrounded, go into the sums; times their values' factors, which lie by
  // slots, and rounded to E4M3 they become the operand of a product. What was there before counts `fade` times from
  // here on.
  __device__ __forceinline__ void update(const float (&scores)[tile_keys / 2], uint32_t (&codes)[tile_keys / 8],
                                         const float* factors, float (&fade)[2], int thread) {
    float shifts[2], sums[2][2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float now = top[i];
#pragma unroll
      for (int j = 2 * i; j < tile_keys / 2; j += 4) now = fmaxf(now, fmaxf(scores[j], scores[j + 1]));
      now = fmaxf(now, exchange(now, 1));
      now = fmaxf(now, exchange(now, 2));
      const float before = top[i];
      top[i] = now;
      shifts[i] = shift(i);
      fade[i] = before == now ? 1 : exp2_fast(fmaf(before, scale[i], -shifts[i]));  // exactly, for consume()'s vote
    }
#pragma unroll
    for (int g = 0; g < tile_keys / 16; ++g) {
      const float4 of = *reinterpret_cast<const float4*>(factors + 16 * g + 4 * (thread % 4));
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float w[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          w[n] = exp2_fast(fmaf(scores[weight(g, i, n)], scale[i], -shifts[i]));
          sums[i][n % 2] += w[n];
        }
        codes[operand_word(g, i)] = pack_e4m3(w[0] * of.x, w[1] * of.y, w[2] * of.z, w[3] * of.w);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) sum[i] = fmaf(sum[i], fade[i], sums[i][0] + sums[i][1]);
  }

  // The same in terms of scores as the definition has them, for result.cuh. `scale_log2`: log2 e / sqrt D.
  __device__ __forceinline__ Softmax plain(float scale_log2, const float (&query_scale)[2]) const {
    return {scale_log2, {top[0] * query_scale[0], top[1] * query_scale[1]}, {sum[0], sum[1]}};
  }
};

}  // namespace dsa_rt::cuda::hopper
