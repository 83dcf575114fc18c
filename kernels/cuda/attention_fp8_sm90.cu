// The launcher of the Hopper attention kernel for K and V in E4M3. The kernel: hopper/attention_fp8.cuh; why it is as
// it is: docs/kernels/attention-hopper-fp8.md.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "attention.h"
#include "hopper/attention_fp8.cuh"
#include "hopper/launch.h"
#include "hopper/support_fp8.h"

namespace dsa_rt::cuda {
namespace {

using namespace hopper;

constexpr const char* op = "active_attention_fp8";

template <int D>
void launch(const ScaledAttentionParams& a, const Plan& plan, float* scratch, cudaStream_t stream) {
  constexpr int bytes = fp8::shared_bytes<D>;
  const fp8::Arguments p = fp8::make_arguments<D>(a, plan, scratch);
  check(op, cudaFuncSetAttribute(attention_fp8_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  attention_fp8_kernel<D><<<std::min(plan.works, multiprocessors()), block_threads, bytes, stream>>>(p);
  check(op, cudaGetLastError());
  if (const int blocks = join_blocks<D>(plan)) {
    join_kernel<D><<<blocks, warpgroup, 0, stream>>>({plan, p.result});
    check(op, cudaGetLastError());
  }
}

}  // namespace

bool attention_fp8_supported(const ScaledAttentionParams& a, std::string* why) {
  *why = fp8::refusal(a);
  if (why->empty()) *why = device_refusal();
  return why->empty();
}

int64_t attention_fp8_scratch(const ScaledAttentionParams& a) {
  std::string why;
  return attention_fp8_supported(a, &why) ? scratch_floats(fp8::split_plan(a, multiprocessors()), a.dim) : 0;
}

void active_attention_fp8(const ScaledAttentionParams& a, float* scratch, uintptr_t stream) {
  std::string why;
  if (!attention_fp8_supported(a, &why)) throw std::runtime_error(std::string(op) + ": " + why);
  const Plan plan = scratch ? fp8::split_plan(a, multiprocessors()) : make_plan(a);
  if (!plan.works) return;
  const auto launcher = a.dim == 64 ? launch<64> : launch<128>;
  launcher(a, plan, scratch, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace dsa_rt::cuda
