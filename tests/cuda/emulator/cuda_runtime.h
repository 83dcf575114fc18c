// Enough of CUDA to run this project's kernels on a CPU: a thread is a fiber, and fibers take turns where the kernel
// waits for other threads (emulator.cpp). For tests of logic and addresses; nothing here is like a GPU in speed, memory
// ordering or rounding of special functions. Vector accesses to addresses that are no multiple of their size fail.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local  // one block's: blocks that live at the same time have CPU threads of their own

struct dim3 {
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  unsigned x, y, z;
};
extern thread_local dim3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

[[noreturn]] void fail(const char* why);  // ends the launch
void meet_warp();
void meet_block();
void meet_grid();
float* exchange_slots();  // of the current warp
int run(dim3 grid, dim3 block, bool cooperative, const std::function<void()>& kernel);

template <class T>
const T* checked(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) fail("a misaligned access");
  return p;
}

}  // namespace emulator

struct uint4 {
  unsigned x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};

template <class T>
T __ldg(const T* p) {
  return *emulator::checked(p);
}
template <class T>
T __ldcg(const T* p) {
  return *emulator::checked(p);
}
template <class T>
void __stwb(T* p, T value) {
  *const_cast<T*>(emulator::checked(p)) = value;
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void __syncthreads() { emulator::meet_block(); }
inline void __syncwarp() { emulator::meet_warp(); }
[[noreturn]] inline void __trap() { emulator::fail("a trap"); }
using std::min;

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  float* slots = emulator::exchange_slots();
  slots[threadIdx.x % 32] = value;
  emulator::meet_warp();
  const float other = slots[(threadIdx.x % 32) ^ static_cast<unsigned>(mask)];
  emulator::meet_warp();
  return other;
}

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
const char* cudaGetErrorString(cudaError_t);
enum { cudaLaunchAttributeCooperative, cudaDevAttrMultiProcessorCount };
struct cudaLaunchAttribute {
  int id;
  struct {
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int device);
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  return emulator::run(config->gridDim, config->blockDim, config->numAttrs == 1, [&] { kernel(arguments...); });
}
