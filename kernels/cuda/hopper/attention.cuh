// Attention on Hopper: one persistent block per multiprocessor, a producer warpgroup and two consumer warpgroups.
//
// The producer's one busy thread brings tiles of Q, K and V to shared memory by TMA, K and V in rings of stages. Each
// consumer owns 64 of the tile's 128 query rows: scores S = Q KT into registers, softmax there, O += P V with P from
// registers. Products and arithmetic overlap in two ways: a consumer has the product of the last tile's weights in flight
// while it works on a tile's softmax, and the two consumers take turns at issuing products, so that one's softmax falls
// into the other's products. docs/kernels/attention-hopper.md derives tiles and cycles.
#pragma once

#include <stdint.h>

#include <cmath>

#include "barrier.cuh"
#include "layout.cuh"
#include "result.cuh"
#include "scheduler.cuh"
#include "softmax.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace dsa_rt::cuda::hopper {

constexpr int block_threads = (1 + consumers) * warpgroup, consumer_warps = consumers * warpgroup / 32;

struct Arguments {
  TensorMap q, k;
  TensorMap v[2 * max_segments];  // one for each range, ending where it ends: rows beyond arrive as zeros, so that
                                  // weights of 0 meet no NaN. Keys need none: their scores are masked.
  Plan plan;
  Result result;
};
static_assert(sizeof(Arguments) <= 4096, "parameters of a kernel");

template <int D, Element element>
Arguments make_arguments(const AttentionParams& a, const Plan& plan, float* scratch) {
  Arguments p = {};
  p.q = rows_map(a.q, a.batch, a.active, a.heads, D, tile_queries, element);
  p.k = rows_map(a.k, a.batch, a.rows, a.heads, D, tile_keys, element);
  for (int i = 0; i < plan.segment_count; ++i)
    for (int range = 0; range < plan.segments[i].ranges; ++range)
      p.v[2 * i + range] = rows_map(a.v, a.batch, plan.segments[i].end[range], a.heads, D, tile_keys, element);
  p.plan = plan;
  p.result = {a.out, a.lse, a.lse_batch_stride, a.lse_head_stride, scratch,
              (float)(1.44269504088896340736 / std::sqrt((double)D))};
  return p;
}

// Stages, to cover the latency of memory with the work on 384 keys or more. For D = 128 no more fit.
template <int D>
constexpr int stages = D == 128 ? 3 : 4;

template <int D>
struct alignas(swizzle_atom_bytes) Storage {
  using Row = uint16_t[slab_columns];
  Row q[D / slab_columns][tile_queries];
  Row k[stages<D>][D / slab_columns][tile_keys];
  Row v[stages<D>][D / slab_columns][tile_keys];
  Barrier q_full, q_empty;
  Barrier k_full[stages<D>], k_empty[stages<D>], v_full[stages<D>], v_empty[stages<D>];
};

template <int D>
constexpr int shared_bytes = sizeof(Storage<D>) + swizzle_atom_bytes;  // room to align

// A place in a ring of stages, and the parity of its barriers' phase on this lap.
template <int count>
struct Cursor {
  int stage = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == count) {
      stage = 0;
      parity ^= 1;
    }
  }
};

template <int D>
__device__ __forceinline__ void produce(const Arguments& p, Storage<D>& shared) {
  Cursor<stages<D>> key, value;
  Cursor<1> query;
  for (int64_t round = 0;; ++round) {
    const int64_t index = work_index(round, blockIdx.x, gridDim.x);
    if (index >= p.plan.works) return;
    const Work work = work_of(p.plan, (int)index);
    const QueryTile& tile = work.tile;
    const Segment& segment = p.plan.segments[work.segment];

    const auto load_keys = [&](const KeyTile& rows) {
      wait(shared.k_empty[key.stage], key.parity ^ 1);
      arrive_and_expect(shared.k_full[key.stage], sizeof(shared.k[0]));
      load_rows(shared.k[key.stage], p.k, shared.k_full[key.stage], rows.row, tile.head, tile.batch);
      key.advance();
    };
    const auto load_values = [&](const KeyTile& rows) {
      wait(shared.v_empty[value.stage], value.parity ^ 1);
      arrive_and_expect(shared.v_full[value.stage], sizeof(shared.v[0]));
      load_rows(shared.v[value.stage], p.v[2 * work.segment + rows.range], shared.v_full[value.stage], rows.row,
                tile.head, tile.batch);
      value.advance();
    };

    wait(shared.q_empty, query.parity ^ 1);
    arrive_and_expect(shared.q_full, sizeof(shared.q));
    load_rows(shared.q, p.q, shared.q_full, segment.first_query + tile.first, tile.head, tile.batch);
    query.advance();

    // In the order in which consumers use them: the values of a tile after the keys of the next.
    KeyTile rows = key_tile(segment, work.first_keys);
    load_keys(rows);
    for (int i = work.first_keys + 1; i < work.end_keys; ++i) {
      const KeyTile next = key_tile(segment, i);
      load_keys(next);
      load_values(rows);
      rows = next;
    }
    load_values(rows);
  }
}

// Issues S = Q KT: this consumer's 64 rows of q, all 128 of k.
template <int D, Element element>
__device__ __forceinline__ void issue_scores(float (&s)[tile_keys / 2], uint64_t q, uint64_t k) {
  multiply<element, false>(s, q, k);
#pragma unroll
  for (int step = 1; step < D / mma_depth; ++step)
    multiply<element, true>(s, q + k_major_step(step, tile_queries), k + k_major_step(step, tile_keys));
  commit();
}

// Issues O += P V.
template <int D, Element element>
__device__ __forceinline__ void issue_output(float (&o)[D / 2], const uint32_t (&p)[tile_keys / 4], uint64_t v) {
#pragma unroll
  for (int step = 0; step < tile_keys / mma_depth; ++step) multiply<element>(o, p + 4 * step, v + mn_major_step(step));
  commit();
}

// Weights as the A operand of the second product: in the order of layout.cuh's operand_pair.
template <Element element>
__device__ __forceinline__ void pack(uint32_t (&p)[tile_keys / 4], const float (&s)[tile_keys / 2]) {
#pragma unroll
  for (int step = 0; step < tile_keys / mma_depth; ++step)
#pragma unroll
    for (int pair = 0; pair < 4; ++pair)
      p[4 * step + pair] = pack_pair<element>(s[operand_pair(step, pair)], s[operand_pair(step, pair) + 1]);
}

template <int D, Element element>
__device__ __forceinline__ void consume(const Arguments& p, Storage<D>& shared, int consumer, int thread) {
  const int my_turn = 1 + consumer, others_turn = 2 - consumer;  // named barriers; 0 is __syncthreads's
  const int first_row = consumer * mma_rows;
  const bool speaks = thread % 32 == 0;  // for its warp, whose products' reads are over when its own are
  const uint64_t q = k_major(shared_address(shared.q) + first_row * slab_row_bytes);
  Cursor<stages<D>> key, value;
  Cursor<1> query;

  const auto done = [&](Barrier& empty) {
    if (speaks) arrive(empty);
  };

  if (consumer == 1) named_arrive(others_turn, consumers * warpgroup);
  for (int64_t round = 0;; ++round) {
    const int64_t index = work_index(round, blockIdx.x, gridDim.x);
    if (index >= p.plan.works) break;
    const Work work = work_of(p.plan, (int)index);
    const Segment& segment = p.plan.segments[work.segment];

    Softmax softmax{p.result.scale_log2};
    float s[tile_keys / 2], o[D / 2] = {}, fade[2];
    uint32_t weights[tile_keys / 4];

    wait(shared.q_full, query.parity);
    query.advance();
    wait(shared.k_full[key.stage], key.parity);
    named_sync(my_turn, consumers * warpgroup);
    start(s);
    issue_scores<D, element>(s, q, k_major(shared_address(shared.k[key.stage])));
    named_arrive(others_turn, consumers * warpgroup);
    finish<0>(s);
    done(shared.k_empty[key.stage]);
    if (work.first_keys + 1 == work.end_keys) done(shared.q_empty);
    if (const int rows = key_tile(segment, work.first_keys).rows; rows < tile_keys) mask(s, rows, thread);
    softmax.update(s, fade);
    pack<element>(weights, s);
    wait(shared.v_full[value.stage], value.parity);

    for (int i = work.first_keys + 1; i < work.end_keys; ++i) {
      key.advance();
      wait(shared.k_full[key.stage], key.parity);
      named_sync(my_turn, consumers * warpgroup);
      start(s, o, weights);
      issue_scores<D, element>(s, q, k_major(shared_address(shared.k[key.stage])));
      issue_output<D, element>(o, weights, mn_major(shared_address(shared.v[value.stage]), tile_keys));
      named_arrive(others_turn, consumers * warpgroup);
      finish<1>(s);
      done(shared.k_empty[key.stage]);
      if (i + 1 == work.end_keys) done(shared.q_empty);
      if (const int rows = key_tile(segment, i).rows; rows < tile_keys) mask(s, rows, thread);
      softmax.update(s, fade);
      pin(s);
      // The wait for the next values stands here to keep the compiler from moving the end of the second product ahead
      // of the softmax, which it does inside a block of instructions; behind a loop it cannot.
      auto next = value;
      next.advance();
      wait(shared.v_full[next.stage], next.parity);
      finish<0>(o, weights);
      done(shared.v_empty[value.stage]);
      value = next;
      pack<element>(weights, s);
#pragma unroll
      for (int j = 0; j < D / 2; ++j) o[j] *= fade[j / 2 % 2];
    }
    key.advance();

    start(o, weights);
    issue_output<D, element>(o, weights, mn_major(shared_address(shared.v[value.stage]), tile_keys));
    finish<0>(o, weights);
    done(shared.v_empty[value.stage]);
    value.advance();
    if (work.slot < 0)
      write<D, element>(p.result, segment, work.tile, o, softmax, first_row, thread);
    else
      write_partial<D>(p.result, segment, work, o, softmax, first_row, thread);
  }
  if (consumer == 0) named_sync(my_turn, consumers * warpgroup);  // the arrival that is left
}

template <int D, Element element>
__global__ void __launch_bounds__(block_threads, 1) attention_kernel(const __grid_constant__ Arguments p) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ unsigned char memory[];
  const uint32_t unaligned = shared_address(memory);
  Storage<D>& shared = *reinterpret_cast<Storage<D>*>(memory + (-unaligned & (swizzle_atom_bytes - 1)));
  if (threadIdx.x == 0) {
    init(shared.q_full, 1);
    init(shared.q_empty, consumer_warps);
    for (int i = 0; i < stages<D>; ++i) {
      init(shared.k_full[i], 1);
      init(shared.k_empty[i], consumer_warps);
      init(shared.v_full[i], 1);
      init(shared.v_empty[i], consumer_warps);
    }
    fence_init();
  }
  __syncthreads();
  // 128 * 24 + 256 * 240 registers are the 168 each that the block starts with.
  const int role = uniform(threadIdx.x / warpgroup);
  if (role == 0) {
    give_registers<24>();
    if (threadIdx.x == 0) produce<D>(p, shared);
  } else {
    take_registers<240>();
    consume<D, element>(p, shared, role - 1, threadIdx.x % warpgroup);
  }
#else
  __trap();
#endif
}

}  // namespace dsa_rt::cuda::hopper
