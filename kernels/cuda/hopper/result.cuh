// Results on their way from registers to memory: of a whole tile to the rows of out; of a part of a tile's keys to
// scratch, and from there, joined with the tile's other parts, to the rows of out.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../../attention.h"
#include "layout.cuh"
#include "registers.cuh"
#include "scheduler.cuh"
#include "softmax.cuh"

namespace dsa_rt::cuda::hopper {

constexpr int warpgroup = 128, consumers = 2;
static_assert(tile_queries == consumers * mma_rows);

struct Result {
  Heads out;
  float* lse;
  int64_t lse_batch_stride, lse_head_stride;
  float* scratch;    // Partial<D>, as many as the plan's parts
  float scale_log2;  // log2 e / sqrt D
};

// A part's result: the sums of weighted values, not divided, as fragments, so that a warp writes and reads 512
// contiguous bytes at a time; for each row the largest score and the sum of weights. Rows that are no query's are
// neither written nor read.
template <int D>
struct Partial {
  float4 values[2][D / 16][consumers * warpgroup];  // [i][j][thread]: elements 8 j + 2 i + {0, 1, 4, 5} of thread's O
  float2 sums[tile_queries];
};

static_assert(sizeof(Partial<64>) == tile_queries * (64 + 2) * sizeof(float) &&
              sizeof(Partial<128>) == tile_queries * (128 + 2) * sizeof(float), "as scratch_floats counts");

// Word w of lane c in a quad and word c of lane w change places.
__device__ __forceinline__ void transpose_quad(uint32_t (&words)[4], int lane) {
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2) {
    const bool upper = lane & bit;
#pragma unroll
    for (int low = 0; low < 4; ++low) {
      if (low & bit) continue;
      const uint32_t other = exchange(upper ? words[low] : words[low | bit], bit);
      words[low] = upper ? other : words[low];
      words[low | bit] = upper ? words[low | bit] : other;
    }
  }
}

// One of the two rows of a tile that a thread holds a share of.
struct Row {
  int64_t query;
  bool mine;  // a query of the segment
};

__device__ __forceinline__ Row row_of(const Segment& segment, const QueryTile& tile, int row) {
  return {(int64_t)segment.first_query + tile.first + row, tile.first + row < segment.queries};
}

__device__ __forceinline__ uint16_t* out_row(const Result& r, const QueryTile& tile, const Row& row) {
  return static_cast<uint16_t*>(r.out.data) + tile.batch * r.out.batch_stride + row.query * r.out.row_stride +
         tile.head * r.out.head_stride;
}

// Columns 32 group to 32 group + 31 of a row, four words of two in each thread of the quad: 64 contiguous bytes.
__device__ __forceinline__ void store_columns(uint16_t* out, bool mine, int group, uint32_t (&words)[4], int thread) {
  transpose_quad(words, thread);
  if (mine) *reinterpret_cast<uint4*>(out + 32 * group + 8 * (thread % 4)) = {words[0], words[1], words[2], words[3]};
}

__device__ __forceinline__ void store_sum(const Result& r, const QueryTile& tile, const Row& row, float log_sum_exp,
                                          int thread) {
  if (row.mine && r.lse && thread % 4 == 0)
    r.lse[tile.batch * r.lse_batch_stride + tile.head * r.lse_head_stride + row.query] = log_sum_exp;
}

// Divides by the sums and writes the rows that are the segment's.
template <int D, Element element = Element::bfloat16>
__device__ __forceinline__ void write(const Result& r, const Segment& segment, const QueryTile& tile,
                                      const float (&o)[D / 2], const Softmax& softmax, int first_row, int thread) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Row row = row_of(segment, tile, first_row + fragment_row(thread) + 8 * i);
    const float total = softmax.total(i), factor = reciprocal(total);
    uint16_t* out = out_row(r, tile, row);
#pragma unroll
    for (int group = 0; group < D / 32; ++group) {
      uint32_t words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int j = 4 * (4 * group + w) + 2 * i;
        words[w] = pack_pair<element>(o[j] * factor, o[j + 1] * factor);
      }
      store_columns(out, row.mine, group, words, thread);
    }
    store_sum(r, tile, row, softmax.log_sum_exp(i, total), thread);
  }
}

template <int D>
__device__ __forceinline__ void write_partial(const Result& r, const Segment& segment, const Work& work,
                                              const float (&o)[D / 2], const Softmax& softmax, int first_row,
                                              int thread) {
  Partial<D>& partial = reinterpret_cast<Partial<D>*>(r.scratch)[work.slot];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = first_row + fragment_row(thread) + 8 * i;
    const float total = softmax.total(i);
    if (!row_of(segment, work.tile, row).mine) continue;
#pragma unroll
    for (int j = 0; j < D / 16; ++j) {
      const int first = 8 * j + 2 * i;
      partial.values[i][j][first_row / mma_rows * warpgroup + thread] = {o[first], o[first + 1], o[first + 4], o[first + 5]};
    }
    if (thread % 4 == 0) partial.sums[row] = {softmax.top[i], total};
  }
}

struct JoinArguments {
  Plan plan;
  Result result;
};

constexpr int join_columns = 32;

template <int D>
int join_blocks(const Plan& p) {
  return p.works > p.tiles ? (p.tiles - p.whole) * consumers * (D / join_columns) : 0;
}

// A block joins 32 columns of 64 rows of a tile in the tail, its parts in their order: each is weighted with
// 2^(scale * (its largest score - the largest of all)), as the running softmax weights what it has so far.
template <int D, Element element = Element::bfloat16>
__global__ void __launch_bounds__(warpgroup) join_kernel(const __grid_constant__ JoinArguments p) {
  constexpr int groups = D / join_columns;
  const int group = blockIdx.x % groups, first_row = blockIdx.x / groups % consumers * mma_rows;
  const Parts parts = parts_of(p.plan, p.plan.whole + blockIdx.x / groups / consumers);
  if (parts.parts == 1) return;
  const Segment& segment = p.plan.segments[parts.segment];
  const Result& r = p.result;
  const Partial<D>* partials = reinterpret_cast<const Partial<D>*>(r.scratch) + parts.slot;
  const int thread = threadIdx.x;

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int place = first_row + fragment_row(thread) + 8 * i;
    const Row row = row_of(segment, parts.tile, place);
    Softmax softmax{r.scale_log2};
    float total = 0, o[8] = {};
    if (row.mine) {
      float top = -INFINITY;
      for (int part = 0; part < parts.parts; ++part)
        top = fmaxf(top, partials[part * parts.stride].sums[place].x);
      softmax.top[i] = top;
      const float shift = softmax.shift(i);
#pragma unroll 4
      for (int part = 0; part < parts.parts; ++part) {
        const Partial<D>& partial = partials[part * parts.stride];
        const float2 sums = partial.sums[place];
        const float weight = exp2_fast(fmaf(sums.x, r.scale_log2, -shift));
        total = fmaf(sums.y, weight, total);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float4 values = partial.values[i][2 * group + half][first_row / mma_rows * warpgroup + thread];
          o[4 * half] = fmaf(values.x, weight, o[4 * half]);
          o[4 * half + 1] = fmaf(values.y, weight, o[4 * half + 1]);
          o[4 * half + 2] = fmaf(values.z, weight, o[4 * half + 2]);
          o[4 * half + 3] = fmaf(values.w, weight, o[4 * half + 3]);
        }
      }
    }
    const float factor = reciprocal(total);
    uint32_t words[4];
#pragma unroll
    for (int w = 0; w < 4; ++w) words[w] = pack_pair<element>(o[2 * w] * factor, o[2 * w + 1] * factor);
    store_columns(out_row(r, parts.tile, row), row.mine, group, words, thread);
    if (group == 0) store_sum(r, parts.tile, row, softmax.log_sum_exp(i, total), thread);
  }
}

}  // namespace dsa_rt::cuda::hopper
