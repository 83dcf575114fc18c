// Python's way in: the Hopper attention kernel with K and V in E4M3 on emulated blocks, and its layout arithmetic.
#include "kernels/cuda/hopper/attention_fp8.cuh"

#include "calls.h"
#include "kernels/cuda/hopper/support_fp8.h"

using namespace dsa_rt;
using namespace dsa_rt::cuda::hopper;
using namespace emulated_calls;

namespace {

thread_local std::string said;

Plan fp8_plan_of(const AttentionParams& p, const Splitting& s) { return plan_of(p, s, fp8::split_plan); }

template <int D>
std::string run(const Request<ScaledAttentionParams>& r, const Plan& plan) {
  static_assert(fp8::shared_bytes<D> <= 227 << 10);
  const fp8::Arguments p = fp8::make_arguments<D>(r.params, plan, r.scratch);
  const int blocks = (int)std::min<int64_t>(plan.works, r.splitting.blocks);
  const std::string error = run_blocks(r, blocks, block_threads, [&] { attention_fp8_kernel<D>(p); });
  return error.empty() ? run_join<D, Element::bfloat16>(r, plan, p.result) : error;
}

}  // namespace

extern "C" {

// Each returns what went wrong, or "".
const char* fp8_refusal(const ScaledAttentionParams* p) { return (said = fp8::refusal(*p)).c_str(); }

const char* fp8_run(const Request<ScaledAttentionParams>* r) {
  if (said = fp8::refusal(r->params); !said.empty()) return said.c_str();
  const Plan plan = fp8_plan_of(r->params, r->splitting);
  said = r->params.dim == 64 ? run<64>(*r, plan) : run<128>(*r, plan);
  return said.c_str();
}

// From now on; 0: as fp32 has them.
void fp8_sum_bits(int bits) { sum_bits = bits; }

// How many floats of scratch the plan takes.
int64_t fp8_scratch_of(const ScaledAttentionParams* p, const Splitting* s) {
  return scratch_floats(fp8_plan_of(*p, *s), p->dim);
}

uint64_t codes_descriptor(uint32_t tile, int line_bytes, int step) {
  return (line_bytes == 64 ? codes_k_major<64>(tile) : codes_k_major<128>(tile)) + codes_step(step);
}
int slot_of_key(int key) { return slot_of(key); }
int word_of_operand(int group, int i) { return operand_word(group, i); }
int accumulator_of_weight(int group, int i, int n) { return weight(group, i, n); }
uint32_t byte_read(int dim, int keys, int channels, int lane) {
  return dim == 64 ? line_read<64>(keys, channels, lane) : line_read<128>(keys, channels, lane);
}
uint32_t byte_written(int keys, int channels, int lane) { return line_written(keys, channels, lane); }
uint32_t pick_of(int lane, int matrix) { return bytes_picked(lane, matrix); }
int scaled_params_bytes() { return sizeof(ScaledAttentionParams); }

}  // extern "C"
