// What the emulated kernels' ways in share: a call as Python describes it, and blocks that run one after another.
#pragma once

#include <string.h>

#include "kernels/cuda/hopper/plan.h"
#include "kernels/cuda/hopper/result.cuh"

namespace emulated_calls {

using namespace dsa_rt;
using namespace dsa_rt::cuda::hopper;

// How the tail is split: not at all, as the host decides for that many blocks, or from a tile on into parts of a
// length.
struct Splitting {
  int64_t blocks, decided, whole, length;
};

// `decide`: the host's own plan.
template <class Decide>
Plan plan_of(const AttentionParams& p, const Splitting& s, const Decide& decide) {
  if (s.decided) return decide(p, (int)s.blocks);
  Plan plan = make_plan(p);
  if (s.length) split_tail(plan, (int)s.whole, (int)s.length);
  return plan;
}

inline Plan plan_of(const AttentionParams& p, const Splitting& s) {
  return plan_of(p, s, [](const AttentionParams& a, int blocks) { return split_plan(a, blocks); });
}

template <class Params>
struct Request {
  Params params;
  Splitting splitting;
  float* scratch;
  uint64_t seed;
  int64_t late;  // emulated::Kind
};

template <class Params>
std::string run_blocks(const Request<Params>& r, int blocks, int threads, const std::function<void()>& kernel) {
  for (int b = 0; b < blocks; ++b) {
    memset(memory, 0xFF, 227 << 10);  // NaN in bf16, fp16 and E4M3
    emulated::Block block(threads, b, blocks, r.seed + b, (emulated::Kind)r.late);
    emulated::block = &block;
    const std::string error = block.run(kernel);
    if (!error.empty()) return error;
  }
  return "";
}

template <int D, Element element, class Params>
std::string run_join(const Request<Params>& r, const Plan& plan, const Result& result) {
  const JoinArguments join = {plan, result};
  return run_blocks(r, join_blocks<D>(plan), warpgroup, [&] { join_kernel<D, element>(join); });
}

}  // namespace emulated_calls
