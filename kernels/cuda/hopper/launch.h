// What the launchers of the Hopper kernels share: the current device, and errors of the runtime.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

namespace dsa_rt::cuda::hopper {

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  if (cudaGetDevice(&device) != cudaSuccess || cudaDeviceGetAttribute(&value, attribute, device) != cudaSuccess) {
    (void)cudaGetLastError();
    return 0;
  }
  return value;
}

inline int multiprocessors() { return std::max(1, device_attribute(cudaDevAttrMultiProcessorCount)); }

// Why the kernels do not run on the current device, as a clause; empty where they do.
inline std::string device_refusal() {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  const int minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  if (major == 9 && minor == 0) return "";
  return "the device has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
         ", the kernel is for 9.0";
}

inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace dsa_rt::cuda::hopper
