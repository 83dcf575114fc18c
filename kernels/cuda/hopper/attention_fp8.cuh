// Attention on Hopper with K and V in E4M3: attention.cuh's blocks, tiles and results, with 8-bit products.
//
// Of the producer warpgroup one warp copies codes and scales of K and V, and two warps transpose V, which 8-bit
// products need. Each consumer owns 64 of the tile's 128 query rows, rounded to E4M3, in registers: scores S = Q KT,
// softmax, P V into fresh accumulators, from there to O in fp32. Consumers take turns: while one has its products and
// adds to O, the other has its softmax. docs/kernels/attention-hopper-fp8.md derives it.
#pragma once

#include <stdint.h>

#include <cmath>

#include "attention.cuh"
#include "softmax_fp8.cuh"

namespace dsa_rt::cuda::hopper::fp8 {

constexpr int transposers = 2;  // warps
constexpr int code_stages = 4, value_stages = 2;

struct Arguments {
  TensorMap k;
  TensorMap v[2 * max_segments];  // as in the bf16 kernel: rows beyond a range arrive as zeros
  Heads q;
  Scales k_scale, v_scale;
  Plan plan;
  Result result;
};
static_assert(sizeof(Arguments) <= 4096, "parameters of a kernel");

template <int D>
Arguments make_arguments(const ScaledAttentionParams& a, const Plan& plan, float* scratch) {
  Arguments p = {};
  p.k = codes_map(a.k, a.batch, a.rows, a.heads, D, tile_keys);
  for (int i = 0; i < plan.segment_count; ++i)
    for (int range = 0; range < plan.segments[i].ranges; ++range)
      p.v[2 * i + range] = codes_map(a.v, a.batch, plan.segments[i].end[range], a.heads, D, tile_keys);
  p.q = a.q;
  p.k_scale = a.k_scale;
  p.v_scale = a.v_scale;
  p.plan = plan;
  p.result = {a.out, a.lse, a.lse_batch_stride, a.lse_head_stride, scratch,
              (float)(1.44269504088896340736 / std::sqrt((double)D))};
  return p;
}

template <int D>
struct alignas(swizzle_atom_bytes) Storage {
  uint8_t k[code_stages][tile_keys * D];
  uint8_t v[code_stages][tile_keys * D];
  uint8_t turned[value_stages][D * tile_keys];  // V transposed
  alignas(16) float k_scale[code_stages][tile_keys], v_scale[code_stages][tile_keys];  // by slots
  alignas(16) float factor[value_stages][tile_keys];  // of weights, by slots: v_scale * 256 / the tile's largest
  float unit[value_stages];                           // of the product with them: the tile's largest v_scale / 256
  Barrier k_full[code_stages], k_empty[code_stages], v_full[code_stages], v_empty[code_stages];
  Barrier turned_full[value_stages], turned_empty[value_stages];
};

template <int D>
constexpr int shared_bytes = sizeof(Storage<D>) + swizzle_atom_bytes;  // room to align

// A warp copies the codes and scales of its block's key tiles, as far ahead as stages are free.
template <int D>
__device__ __forceinline__ void copy(const Arguments& p, Storage<D>& shared, int lane) {
  Cursor<code_stages> to;
  for (int64_t round = 0;; ++round) {
    const int64_t index = work_index(round, blockIdx.x, gridDim.x);
    if (index >= p.plan.works) return;
    const Work work = work_of(p.plan, (int)index);
    const QueryTile& tile = work.tile;
    for (int i = work.first_keys; i < work.end_keys; ++i) {
      const KeyTile rows = key_tile(p.plan.segments[work.segment], i);
      const auto fill = [&](uint8_t* codes, float* scales, const TensorMap& map, const Scales& from, Barrier& full,
                            Barrier& empty) {
        wait(empty, to.parity ^ 1);
        if (lane == 0) {
          arrive_and_expect(full, tile_keys * D);
          load_rows(codes, map, full, rows.row, tile.head, tile.batch);
        }
        const float* first = from.data + tile.batch * from.batch_stride + tile.head;
#pragma unroll
        for (int key = lane; key < tile_keys; key += 32)
          copy_number(scales + slot_of(key), first + (rows.row + (int64_t)key) * from.row_stride, key < rows.rows);
        arrive_when_copied(full);
      };
      fill(shared.k[to.stage], shared.k_scale[to.stage], p.k, p.k_scale, shared.k_full[to.stage],
           shared.k_empty[to.stage]);
      fill(shared.v[to.stage], shared.v_scale[to.stage], p.v[2 * work.segment + rows.range], p.v_scale,
           shared.v_full[to.stage], shared.v_empty[to.stage]);
      to.advance();
    }
  }
}

// Scales of values become factors of weights, at most 256, and the tile's unit. NaN does not count for the largest.
__device__ __forceinline__ void weigh(const float* scales, float* factors, float* unit, int warp, int lane) {
  const float4 of = reinterpret_cast<const float4*>(scales)[lane];
  float most = fmaxf(fmaxf(fabsf(of.x), fabsf(of.y)), fmaxf(fabsf(of.z), fabsf(of.w)));
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) most = fmaxf(most, exchange(most, mask));
  most = fmaxf(most, least_scale);
  const float factor = reciprocal(most);  // times a scale first: 256 * factor may exceed what there is
  if (lane * transposers / 32 == warp)
    reinterpret_cast<float4*>(factors)[lane] = {of.x * factor * weight_largest, of.y * factor * weight_largest,
                                                of.z * factor * weight_largest, of.w * factor * weight_largest};
  if (lane == 0 && warp == 0) *unit = most / weight_largest;
}

// Warp `warp` of the two that transpose V.
template <int D>
__device__ __forceinline__ void transpose(const Arguments& p, Storage<D>& shared, int warp, int lane) {
  Cursor<code_stages> from;
  Cursor<value_stages> to;
  const uint32_t first_bytes = bytes_picked(lane, 0), other_bytes = bytes_picked(lane, 1);
  for (int64_t round = 0;; ++round) {
    const int64_t index = work_index(round, blockIdx.x, gridDim.x);
    if (index >= p.plan.works) return;
    const Work work = work_of(p.plan, (int)index);
    for (int i = work.first_keys; i < work.end_keys; ++i) {
      wait(shared.v_full[from.stage], from.parity);
      wait(shared.turned_empty[to.stage], to.parity ^ 1);
      weigh(shared.v_scale[from.stage], shared.factor[to.stage], &shared.unit[to.stage], warp, lane);
      constexpr int key_groups = tile_keys / 32 / transposers;
#pragma unroll
      for (int keys = key_groups * warp, n = 0; n < key_groups; ++n, ++keys) {
#pragma unroll
        for (int channels = 0; channels < D / 16; ++channels) {
          uint32_t in[4];
          load_transposed(in, shared.v[from.stage] + line_read<D>(keys, channels, lane));
          store_matrices(shared.turned[to.stage] + line_written(keys, channels, lane),
                         {pick_bytes(in[0], in[1], first_bytes), pick_bytes(in[0], in[1], other_bytes),
                          pick_bytes(in[2], in[3], first_bytes), pick_bytes(in[2], in[3], other_bytes)});
        }
      }
      publish();
      arrive(shared.turned_full[to.stage]);  // each lane for what it wrote
      sync_warp();
      if (lane == 0) arrive(shared.v_empty[from.stage]);
      from.advance();
      to.advance();
    }
  }
}

// Issues S = Q KT: this consumer's 64 rows of q, all 128 of k.
template <int D>
__device__ __forceinline__ void issue_scores(float (&s)[tile_keys / 2], const uint32_t (&q)[D / 8], uint64_t k) {
  multiply_codes<false>(s, q, k);
#pragma unroll
  for (int step = 1; step < D / code_depth; ++step) multiply_codes<true>(s, q + 4 * step, k + codes_step(step));
  commit();
}

// Issues P V of one tile.
template <int D>
__device__ __forceinline__ void issue_product(float (&product)[D / 2], const uint32_t (&p)[tile_keys / 8], uint64_t v) {
  multiply_codes<false>(product, p, v);
#pragma unroll
  for (int step = 1; step < tile_keys / code_depth; ++step)
    multiply_codes<true>(product, p + 4 * step, v + codes_step(step));
  commit();
}

template <int D>
__device__ __forceinline__ void consume(const Arguments& p, Storage<D>& shared, int consumer, int thread) {
  const int my_turn = 1 + consumer, others_turn = 2 - consumer;  // named barriers; 0 is __syncthreads's
  const int first_row = consumer * mma_rows;
  Cursor<code_stages> key;
  Cursor<value_stages> value;

  const auto done = [&](Barrier& empty) {
    sync_warp();  // scales and factors are read by every lane
    if (thread % 32 == 0) arrive(empty);
  };
  const auto keys = [&] { return codes_k_major<D>(shared_address(shared.k[key.stage])); };
  const auto values = [&] { return codes_k_major<slot_line_bytes>(shared_address(shared.turned[value.stage])); };

  if (consumer == 1) named_arrive(others_turn, consumers * warpgroup);
  for (int64_t round = 0;; ++round) {
    const int64_t index = work_index(round, blockIdx.x, gridDim.x);
    if (index >= p.plan.works) break;
    const Work work = work_of(p.plan, (int)index);
    const Segment& segment = p.plan.segments[work.segment];

    uint32_t q[D / 8], weights[tile_keys / 8];
    float query_scale[2], fade[2], s[tile_keys / 2], o[D / 2] = {}, product[D / 2];
    load_queries<D>(q, query_scale, p.q, segment, work.tile, first_row, thread);
    RowSoftmax softmax{{query_scale[0] * p.result.scale_log2, query_scale[1] * p.result.scale_log2}};

    wait(shared.k_full[key.stage], key.parity);
    named_sync(my_turn, consumers * warpgroup);
    start(s, q);
    issue_scores<D>(s, q, keys());
    named_arrive(others_turn, consumers * warpgroup);
    finish<0>(s, q);

    for (int i = work.first_keys;; ++i) {
      scale_keys(s, shared.k_scale[key.stage], thread);
      done(shared.k_empty[key.stage]);
      key.advance();
      if (const int rows = key_tile(segment, i).rows; rows < tile_keys) mask(s, rows, thread);
      wait(shared.turned_full[value.stage], value.parity);
      softmax.update(s, weights, shared.factor[value.stage], fade, thread);
      const float unit = shared.unit[value.stage];

      const bool last = i + 1 == work.end_keys;
      if (!last) wait(shared.k_full[key.stage], key.parity);
      named_sync(my_turn, consumers * warpgroup);
      start(product, weights);
      issue_product<D>(product, weights, values());
      if (any_lane(fade[0] != 1 || fade[1] != 1)) {
#pragma unroll
        for (int j = 0; j < D / 2; ++j) o[j] *= fade[j / 2 % 2];
      }
      finish<0>(product, weights);
      done(shared.turned_empty[value.stage]);
      value.advance();
#pragma unroll
      for (int j = 0; j < D / 2; ++j) o[j] = fmaf(product[j], unit, o[j]);
      if (last) break;
      start(s, q);
      issue_scores<D>(s, q, keys());
      named_arrive(others_turn, consumers * warpgroup);
      finish<0>(s, q);
    }
    named_arrive(others_turn, consumers * warpgroup);

    const Softmax plain = softmax.plain(p.result.scale_log2, query_scale);
    if (work.slot < 0)
      write<D>(p.result, segment, work.tile, o, plain, first_row, thread);
    else
      write_partial<D>(p.result, segment, work, o, plain, first_row, thread);
  }
  if (consumer == 0) named_sync(my_turn, consumers * warpgroup);  // the arrival that is left
}

}  // namespace dsa_rt::cuda::hopper::fp8

namespace dsa_rt::cuda::hopper {

template <int D>
__global__ void __launch_bounds__(block_threads, 1) attention_fp8_kernel(const __grid_constant__ fp8::Arguments p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using namespace fp8;
  extern __shared__ unsigned char memory[];
  const uint32_t unaligned = shared_address(memory);
  fp8::Storage<D>& shared = *reinterpret_cast<fp8::Storage<D>*>(memory + (-unaligned & (swizzle_atom_bytes - 1)));
  if (threadIdx.x == 0) {
    for (int i = 0; i < code_stages; ++i) {
      init(shared.k_full[i], 1 + 32);  // the copied codes; each lane's scales
      init(shared.k_empty[i], consumer_warps);
      init(shared.v_full[i], 1 + 32);
      init(shared.v_empty[i], transposers);
    }
    for (int i = 0; i < value_stages; ++i) {
      init(shared.turned_full[i], 32 * transposers);
      init(shared.turned_empty[i], consumer_warps);
    }
    fence_init();
  }
  __syncthreads();
  // 128 * 56 + 256 * 224 registers are the 168 each that the block starts with.
  const int warp = uniform(threadIdx.x / 32), role = warp / (warpgroup / 32), lane = threadIdx.x % 32;
  if (role == 0) {
    give_registers<56>();
    if (warp == 0) fp8::copy<D>(p, shared, lane);
    if (warp >= warpgroup / 32 - transposers) transpose<D>(p, shared, warp - (warpgroup / 32 - transposers), lane);
  } else {
    take_registers<224>();
    fp8::consume<D>(p, shared, role - 1, threadIdx.x % warpgroup);
  }
#else
  __trap();
#endif
}

}  // namespace dsa_rt::cuda::hopper
