// The Hopper attention kernel's launcher. The kernel: hopper/attention.cuh; why it is as it is:
// docs/kernels/attention-hopper.md.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "hopper/attention.cuh"
#include "hopper/support.h"

namespace dsa_rt::cuda {
namespace {

using namespace hopper;

int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return value;
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("active_attention: ") + cudaGetErrorString(error));
}

template <int D>
void launch(const AttentionParams& a, const Plan& plan, cudaStream_t stream) {
  const Arguments p = make_arguments<D>(a, plan);
  check(cudaFuncSetAttribute(attention_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes<D>));
  const int blocks = std::min(plan.tiles, std::max(1, device_attribute(cudaDevAttrMultiProcessorCount)));
  attention_kernel<D><<<blocks, block_threads, shared_bytes<D>, stream>>>(p);
  check(cudaGetLastError());
}

}  // namespace

bool attention_supported(const AttentionParams& a, std::string* why) {
  *why = hopper_refusal(a);
  if (!why->empty()) return false;
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  if (major == 9 && minor == 0) return true;
  *why = "the device has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
         ", the kernel is for 9.0";
  return false;
}

void active_attention(const AttentionParams& a, uintptr_t stream) {
  std::string why;
  if (!attention_supported(a, &why)) throw std::runtime_error("active_attention: " + why);
  const Plan plan = make_plan(a);
  if (!plan.tiles) return;
  const auto launcher = a.dim == 64 ? launch<64> : launch<128>;
  launcher(a, plan, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace dsa_rt::cuda
