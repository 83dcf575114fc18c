// What the Hopper kernel with K and V in E4M3 takes, and where it splits keys.
#pragma once

#include "support.h"

namespace dsa_rt::cuda::hopper::fp8 {

// Why the kernel does not take the arguments, as a clause; empty where it does.
inline std::string refusal(const ScaledAttentionParams& a) {
  if (a.element != Element::bfloat16) return "the queries are not bfloat16, which the kernel is for";
  for (const auto& refusal : {heads_refusal("k", a.k, a.batch, a.rows, a.heads, 16),
                              heads_refusal("v", a.v, a.batch, a.rows, a.heads, 16)})
    if (!refusal.empty()) return refusal;
  return hopper_refusal(a);
}

// Of a tile of 128 keys, as docs/kernels/attention-hopper-fp8.md estimates it.
constexpr int64_t key_tile_cycles(int64_t dim) { return 1024 + 4 * dim; }

inline Plan split_plan(const AttentionParams& a, int blocks) {
  return hopper::split_plan(a, blocks, key_tile_cycles(a.dim));
}

}  // namespace dsa_rt::cuda::hopper::fp8
