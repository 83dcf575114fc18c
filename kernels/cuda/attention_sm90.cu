// The Hopper attention kernels' launcher. The kernels: hopper/attention.cuh and result.cuh; why it is as it is:
// docs/kernels/attention-hopper.md.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "hopper/attention.cuh"
#include "hopper/launch.h"
#include "hopper/support.h"

namespace dsa_rt::cuda {
namespace {

using namespace hopper;

constexpr const char* op = "active_attention";

template <int D, Element element>
void launch(const AttentionParams& a, const Plan& plan, float* scratch, cudaStream_t stream) {
  const Arguments p = make_arguments<D, element>(a, plan, scratch);
  const auto kernel = attention_kernel<D, element>;
  check(op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<D>));
  kernel<<<std::min(plan.works, multiprocessors()), block_threads, shared_bytes<D>, stream>>>(p);
  check(op, cudaGetLastError());
  if (const int blocks = join_blocks<D>(plan)) {
    join_kernel<D, element><<<blocks, warpgroup, 0, stream>>>({plan, p.result});
    check(op, cudaGetLastError());
  }
}

}  // namespace

bool attention_supported(const AttentionParams& a, std::string* why) {
  *why = hopper_refusal(a);
  if (!why->empty()) return false;
  *why = device_refusal();
  return why->empty();
}

int64_t attention_scratch(const AttentionParams& a) {
  std::string why;
  return attention_supported(a, &why) ? scratch_floats(split_plan(a, multiprocessors()), a.dim) : 0;
}

void active_attention(const AttentionParams& a, float* scratch, uintptr_t stream) {
  std::string why;
  if (!attention_supported(a, &why)) throw std::runtime_error("active_attention: " + why);
  const Plan plan = scratch ? split_plan(a, multiprocessors()) : make_plan(a);
  if (!plan.works) return;
  const auto launcher = a.element == Element::bfloat16
                            ? (a.dim == 64 ? launch<64, Element::bfloat16> : launch<128, Element::bfloat16>)
                            : (a.dim == 64 ? launch<64, Element::float16> : launch<128, Element::float16>);
  launcher(a, plan, scratch, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace dsa_rt::cuda
