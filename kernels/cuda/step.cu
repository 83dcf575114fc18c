// The step family. Bytes and order of operations as in kernels/cpu/step_impl.h; compile with -fmad=false.
//
// renoise and philox_normal: a thread per four elements, which is one Philox block. cached_step: a warp per row and
// two launches, fresh rows into the cache (with the score), then all rows; x and the stale part of the cache, most of
// the bytes, move once. Rows out of range are not written and stop the kernel, as the framework's indexing does;
// duplicates are for the host to refuse when it plans.
#include <algorithm>

#include "../philox.h"
#include "common.cuh"
#include "step.h"

namespace dsa_rt::cuda {
namespace {

constexpr int threads = 256;

Grid grid_for(int64_t items) { return {std::min<int64_t>((items + threads - 1) / threads, 1 << 20), 1, threads}; }

template <class Body>
void with_types(Element x, Element velocity, Body body) {
  with_type(x, [&](auto of_x) { with_type(velocity, [&](auto of_velocity) { body(of_x, of_velocity); }); });
}

// A thread's share of [B, A, blocks of four elements].
struct Place {
  int64_t batch, row;
  uint32_t block;
  int first, count;
};

template <class Params>
__device__ Place place_of(const Params& p, int64_t item) {
  const int64_t blocks = (p.width + 3) / 4, block = item % blocks, row = item / blocks;
  return {row / p.rows, row % p.rows, (uint32_t)block, (int)(4 * block), (int)min((int64_t)4, p.width - 4 * block)};
}

template <class T>
__global__ void philox_normal_kernel(const __grid_constant__ PhiloxNormalParams p, int64_t items) {
  for (int64_t i = blockIdx.x * (int64_t)threads + threadIdx.x; i < items; i += (int64_t)gridDim.x * threads) {
    const Place at = place_of(p, i);
    const Normals n = philox_normals(at.block, p.draw, (uint64_t)p.tokens[at.row], (uint64_t)p.seeds[at.batch]);
    const float normals[4] = {n.n0, n.n1, n.n2, n.n3};
    T* out = row_of<T>(p.out, at.batch, at.row) + at.first;
#pragma unroll
    for (int k = 0; k < 4; ++k)
      if (k < at.count) store(out + k, normals[k]);
  }
}

template <class X, class V>
__global__ void renoise_kernel(const __grid_constant__ RenoiseParams p, int64_t items) {
  for (int64_t i = blockIdx.x * (int64_t)threads + threadIdx.x; i < items; i += (int64_t)gridDim.x * threads) {
    const Place at = place_of(p, i);
    const X* x = row_of<const X>(p.x, at.batch, at.row) + at.first;
    const V* velocity = row_of<const V>(p.velocity, at.batch, at.row) + at.first;
    X* out = row_of<X>(p.out, at.batch, at.row) + at.first;
    X* x0 = p.x0.data ? row_of<X>(p.x0, at.batch, at.row) + at.first : nullptr;
    float normals[4] = {};
    if (p.sigma_next != 0.0f) {
      const Normals n = philox_normals(at.block, p.draw, (uint64_t)p.tokens[at.row], (uint64_t)p.seeds[at.batch]);
      normals[0] = n.n0, normals[1] = n.n1, normals[2] = n.n2, normals[3] = n.n3;
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (k >= at.count) break;
      const float clean = load(x + k) - p.sigma * load(velocity + k);
      if (x0) store(x0 + k, clean);
      store(out + k, p.sigma_next != 0.0f ? p.keep * clean + p.sigma_next * normals[k] : clean);
    }
  }
}

template <class V>
__global__ void store_fresh_kernel(const __grid_constant__ CachedStepParams p) {
  const int lane = threadIdx.x % warp;
  const int64_t warps = (int64_t)gridDim.x * (threads / warp);
  for (int64_t i = blockIdx.x * (int64_t)(threads / warp) + threadIdx.x / warp; i < p.batch * p.active; i += warps) {
    const int64_t batch = i / p.active, index = i % p.active, row = p.fresh_rows[index];
    if (row < 0 || row >= p.rows) __trap();
    const V* fresh = row_of<const V>(p.fresh, batch, index);
    V* cache = row_of<V>(p.cache, batch, row);
    float change = 0, norm = 0;
    for (int64_t k = lane; k < p.width; k += warp) {
      const V value = fresh[k];
      if (p.score) {
        change += fabsf(load(&value) - load(cache + k));
        norm += fabsf(load(&value));
      }
      cache[k] = value;
    }
    if (!p.score) continue;
    change = warp_sum(change);
    norm = warp_sum(norm);
    const float smallest = bits_to_float(0x00800000u);
    if (lane == 0) p.score[batch * p.score_stride + index] = change / (norm < smallest ? smallest : norm);
  }
}

template <class X, class V>
__global__ void advance_kernel(const __grid_constant__ CachedStepParams p) {
  const int lane = threadIdx.x % warp;
  const int64_t warps = (int64_t)gridDim.x * (threads / warp);
  for (int64_t i = blockIdx.x * (int64_t)(threads / warp) + threadIdx.x / warp; i < p.batch * p.rows; i += warps) {
    X* x = row_of<X>(p.x, i / p.rows, i % p.rows);
    const V* cache = row_of<const V>(p.cache, i / p.rows, i % p.rows);
    for (int64_t k = lane; k < p.width; k += warp) store(x + k, load(x + k) + p.delta_sigma * load(cache + k));
  }
}

__global__ void exit_decision_kernel(const __grid_constant__ ExitDecisionParams p) {
  for (int64_t i = blockIdx.x * (int64_t)threads + threadIdx.x; i < p.batch; i += (int64_t)gridDim.x * threads) {
    float logit = 0;
    with_pointer(p.logit_element, p.logit, [&](auto logits) { logit = load(logits + i); });
    const float confidence = (float)(1.0 / (1.0 + exp(-(double)logit)));
    p.confidence[i] = confidence;
    p.refine[i] = confidence < p.threshold[i];
  }
}

}  // namespace

void philox_normal(const PhiloxNormalParams& p, uintptr_t stream) {
  const int64_t items = p.batch * p.rows * ((p.width + 3) / 4);
  if (!items) return;
  with_type(p.out.element, [&](auto type) {
    launch("philox_normal", philox_normal_kernel<decltype(type)>, grid_for(items), stream, p, items);
  });
}

void renoise(const RenoiseParams& p, uintptr_t stream) {
  const int64_t items = p.batch * p.rows * ((p.width + 3) / 4);
  if (!items) return;
  with_types(p.x.element, p.velocity.element, [&](auto x, auto velocity) {
    launch("renoise", renoise_kernel<decltype(x), decltype(velocity)>, grid_for(items), stream, p, items);
  });
}

void cached_step(const CachedStepParams& p, uintptr_t stream) {
  const int64_t fresh = p.batch * p.active * warp, all = p.batch * p.rows * warp;
  if (!all) return;
  with_types(p.x.element, p.cache.element, [&](auto x, auto velocity) {
    using V = decltype(velocity);
    if (fresh) launch("cached_step", store_fresh_kernel<V>, grid_for(fresh), stream, p);
    launch("cached_step", advance_kernel<decltype(x), V>, grid_for(all), stream, p);
  });
}

void exit_decision(const ExitDecisionParams& p, uintptr_t stream) {
  if (p.batch) launch("exit_decision", exit_decision_kernel, grid_for(p.batch), stream, p);
}

}  // namespace dsa_rt::cuda
