// confidence_pool; docs/kernels/cuda.md has its bytes and floor.
//
// The weights of all tokens are needed for every column, and there is no memory for them but the output. So one
// cooperative grid takes the tokens in rounds of C: the scores [H, C] of a round go into out[b], all blocks meet, each
// adds the round to its own columns under a running maximum, all blocks meet again. A block owns 8·slice_vectors
// columns; its sums wait in shared memory, and become the result when the last scores are read. A token's keys are read
// by one warp, its columns by one block, so that both come from memory once. Sums have one order: the same bits in
// every run on a device.
#include <cooperative_groups.h>

#include <cmath>

#include "common.cuh"
#include "layers.h"

namespace dsa_rt::cuda {
namespace {

constexpr int pool_threads = 256, pool_warps = pool_threads / warp, pool_heads = 4, pool_columns = 8;
constexpr int max_slice_vectors = 16, max_pool_sums = 6144;

// Scaled scores, in units of log 2, of one token; by a warp.
template <class T, bool aligned>
__device__ void pool_scores(const ConfidencePoolParams& p, int64_t batch, int64_t token, float* scores) {
  constexpr int count = aligned ? 16 / sizeof(T) : 1;
  const int lane = threadIdx.x % warp, dim = (int)p.dim, width = (int)p.heads * dim;
  const T* keys = row_of<const T>(p.keys, batch, token);
  float squares = 0;
#pragma unroll 4
  for (int column = lane * count; column < width; column += warp * count) {
    const auto key = fetch<count, aligned, Reuse::again>(keys + column);
#pragma unroll
    for (int k = 0; k < count; ++k) squares = fmaf(key[k], key[k], squares);
  }
  const float inverse = rsqrtf(warp_sum(squares) / (float)width + p.eps);
  const float factor = 1.44269504f * inverse * rsqrtf((float)dim);
  const auto heads = [&](auto weight) {
#pragma unroll 2
    for (int head = 0; head < (int)p.heads; ++head) {
      float dot = 0;
      for (int within = lane * count; within < dim; within += warp * count) {
        const int column = head * dim + within;
        const auto key = fetch<count, aligned, Reuse::again>(keys + column);
        const auto query = fetch<count, aligned, Reuse::again>(p.query + column);
        const auto scale = fetch<count, aligned, Reuse::again>(weight + column);
#pragma unroll
        for (int k = 0; k < count; ++k) dot = fmaf(key[k] * scale[k], query[k], dot);
      }
      dot = warp_sum(dot);
      if (lane == 0) scores[(int64_t)head * width] = dot * factor;
    }
  };
  with_pointer(p.weight_element, p.key_weight, heads);
}

// Columns of a token, 0 where the row has ended; `left`: columns from here to its end.
template <class T, bool aligned>
__device__ void pool_values(float (&values)[pool_columns], const T* token, int left) {
  constexpr int count = aligned ? 16 / sizeof(T) : 1;
#pragma unroll
  for (int first = 0; first < pool_columns; first += count) {
    Pack<T, count> pack{};
    if (first < left) pack = fetch<count, aligned, Reuse::again>(token + first);
#pragma unroll
    for (int k = 0; k < count; ++k) values[first + k] = pack[k];
  }
}

template <class T, bool aligned>
__global__ __launch_bounds__(pool_threads) void confidence_pool_kernel(const __grid_constant__ ConfidencePoolParams p,
                                                                       int slice_vectors) {
  __shared__ float sums[max_pool_sums];  // [H, columns of the slice]
  __shared__ float parts[pool_warps][pool_heads][pool_columns * max_slice_vectors];
  __shared__ float top[max_pool_heads], total[max_pool_heads], fade[max_pool_heads];
  const int lane = threadIdx.x % warp, own_warp = threadIdx.x / warp;
  const int heads = (int)p.heads, width = heads * (int)p.dim, slice = pool_columns * slice_vectors;
  const int token_lanes = pool_threads / slice_vectors, token_lane = threadIdx.x / slice_vectors;
  const int first_column = blockIdx.x * slice, column = first_column + threadIdx.x % slice_vectors * pool_columns;
  const auto grid = cooperative_groups::this_grid();

  for (int64_t batch = 0; batch < p.batch; ++batch) {
    float* scores = p.out + batch * heads * width;
    for (int i = threadIdx.x; i < heads * slice; i += pool_threads) sums[i] = 0;
    for (int i = threadIdx.x; i < heads; i += pool_threads) top[i] = -INFINITY, total[i] = 0;

    for (int64_t begin = 0; begin < p.active; begin += width) {
      const int tokens = (int)min((int64_t)width, p.active - begin);
      for (int t = blockIdx.x * pool_warps + own_warp; t < tokens; t += gridDim.x * pool_warps)
        pool_scores<T, aligned>(p, batch, begin + t, scores + t);
      grid.sync();

      for (int head = own_warp; head < heads; head += pool_warps) {
        const float* row = scores + (int64_t)head * width;
        float highest = top[head], added = 0;
        for (int t = lane; t < tokens; t += warp) highest = fmaxf(highest, row[t]);
        highest = warp_max(highest);
        for (int t = lane; t < tokens; t += warp) added += exp2f(row[t] - highest);
        added = warp_sum(added);
        __syncwarp();  // all lanes have read top
        if (lane == 0) {
          fade[head] = exp2f(top[head] - highest);
          total[head] = fmaf(total[head], fade[head], added);
          top[head] = highest;
        }
      }
      __syncthreads();

      for (int head = 0; head < heads; head += pool_heads) {
        float sum[pool_heads][pool_columns] = {};
#pragma unroll 2
        for (int t = token_lane; t < tokens; t += token_lanes) {
          const T* token = row_of<const T>(p.tokens, batch, begin + t) + column;
          float values[pool_columns];
          pool_values<T, aligned>(values, token, width - column);
#pragma unroll
          for (int j = 0; j < pool_heads; ++j) {
            if (head + j >= heads) break;
            const float weight = exp2f(scores[(int64_t)(head + j) * width + t] - top[head + j]);
#pragma unroll
            for (int k = 0; k < pool_columns; ++k) sum[j][k] = fmaf(weight, values[k], sum[j][k]);
          }
        }
        for (int offset = warp / 2; offset >= slice_vectors; offset /= 2)
#pragma unroll
          for (int j = 0; j < pool_heads; ++j)
#pragma unroll
            for (int k = 0; k < pool_columns; ++k) sum[j][k] += __shfl_xor_sync(0xFFFFFFFFu, sum[j][k], offset);
        if (lane < slice_vectors)
#pragma unroll
          for (int j = 0; j < pool_heads; ++j)
#pragma unroll
            for (int k = 0; k < pool_columns; ++k) parts[own_warp][j][lane * pool_columns + k] = sum[j][k];
        __syncthreads();
        for (int i = threadIdx.x; i < min(pool_heads, heads - head) * slice; i += pool_threads) {
          const int j = i / slice, own = head * slice + i;
          float added = 0;
#pragma unroll
          for (int w = 0; w < pool_warps; ++w) added += parts[w][j][i % slice];
          sums[own] = fmaf(sums[own], fade[head + j], added);
        }
        __syncthreads();
      }
      grid.sync();
    }

    for (int i = threadIdx.x; i < heads * slice; i += pool_threads) {
      const int head = i / slice, c = first_column + i % slice;
      if (c < width) scores[(int64_t)head * width + c] = sums[i] / total[head];
    }
    __syncthreads();
  }
}

}  // namespace

void confidence_pool(const ConfidencePoolParams& p, uintptr_t stream) {
  const int64_t width = p.heads * p.dim;
  if (!p.batch || !p.active || !width) return;
  if (p.heads > max_pool_heads)
    throw std::runtime_error("confidence_pool: " + std::to_string(p.heads) + " heads, expected at most " +
                             std::to_string(max_pool_heads) + "; use another backend");
  const bool aligned = p.dim % (16 / size_of(p.keys.element)) == 0 && aligned_rows(p.keys) && aligned_rows(p.tokens) &&
                       aligned16(p.query) && aligned16(p.key_weight);
  with_type(p.keys.element, [&](auto type) {
    using T = decltype(type);
    const auto kernel = aligned ? confidence_pool_kernel<T, true> : confidence_pool_kernel<T, false>;
    int device = 0, multiprocessors = 0, per_multiprocessor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, pool_threads, 0);
    // The narrowest slices with which all blocks run at once.
    for (int vectors = 2; vectors <= max_slice_vectors; vectors *= 2) {
      const int64_t slice = vectors * pool_columns, blocks = (width + slice - 1) / slice;
      if (p.heads * slice > max_pool_sums) break;
      if (blocks > static_cast<int64_t>(multiprocessors) * per_multiprocessor) continue;
      return launch("confidence_pool", kernel, {blocks, 1, pool_threads, true}, stream, p, vectors);
    }
    throw std::runtime_error("confidence_pool: C = " + std::to_string(width) + " needs more blocks at once than this " +
                             "device runs; use another backend");
  });
}

}  // namespace dsa_rt::cuda
