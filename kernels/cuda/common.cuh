// What the CUDA kernels share: elements and vectors of them as fp32, sums over a warp, and launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../attention.h"
#include "../step.h"

namespace dsa_rt::cuda {

constexpr int warp = 32;

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const __nv_bfloat16* p) { return __bfloat162float(*p); }
__device__ __forceinline__ float load(const __half* p) { return __half2float(*p); }
__device__ __forceinline__ void store(float* p, float value) { *p = value; }
__device__ __forceinline__ void store(__nv_bfloat16* p, float value) { *p = __float2bfloat16_rn(value); }
__device__ __forceinline__ void store(__half* p, float value) { *p = __float2half_rn(value); }

template <class T>
__device__ __forceinline__ T* row_of(const Rows& rows, int64_t batch, int64_t row) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride;
}

// `count` elements as they lie in memory, held in registers.
template <class T, int count>
struct Pack {
  T element[count];

  __device__ __forceinline__ float operator[](int k) const { return load(element + k); }
};

// The widest type that divides `bytes`, up to the 16 bytes that one access moves.
template <int bytes>
using Word = std::conditional_t<
    bytes % 16 == 0, uint4,
    std::conditional_t<bytes % 8 == 0, uint2,
                       std::conditional_t<bytes % 4 == 0, uint32_t,
                                          std::conditional_t<bytes % 2 == 0, uint16_t, uint8_t>>>>;

// once: read by one thread, so past L1, which keeps what rows share. again: shared and constant while the kernel runs.
enum class Reuse { once, again };

// With `aligned`, p is a multiple of the word; else of the element alone.
template <int count, bool aligned, Reuse reuse, class T>
__device__ __forceinline__ Pack<T, count> fetch(const T* p) {
  using W = std::conditional_t<aligned, Word<count * sizeof(T)>, Word<sizeof(T)>>;
  constexpr int words = count * sizeof(T) / sizeof(W);
  W word[words];
#pragma unroll
  for (int i = 0; i < words; ++i) {
    const W* from = reinterpret_cast<const W*>(p) + i;
    word[i] = reuse == Reuse::once ? __ldcg(from) : __ldg(from);
  }
  Pack<T, count> pack;
  memcpy(&pack, word, sizeof pack);
  return pack;
}

template <bool aligned, class T, int count>
__device__ __forceinline__ void put(T* p, const Pack<T, count>& pack) {
  using W = std::conditional_t<aligned, Word<count * sizeof(T)>, Word<sizeof(T)>>;
  constexpr int words = count * sizeof(T) / sizeof(W);
  W word[words];
  memcpy(word, &pack, sizeof pack);
#pragma unroll
  for (int i = 0; i < words; ++i) __stwb(reinterpret_cast<W*>(p) + i, word[i]);  // in one piece: "=" may be split
}

template <int count>
__device__ __forceinline__ void round_to(Pack<float, count>& pack, const float (&values)[count]) {
#pragma unroll
  for (int k = 0; k < count; ++k) pack.element[k] = values[k];
}

__device__ __forceinline__ __nv_bfloat162 round_pair(__nv_bfloat16, float x, float y) {
  return __floats2bfloat162_rn(x, y);
}
__device__ __forceinline__ __half2 round_pair(__half, float x, float y) { return __floats2half2_rn(x, y); }

template <class T, int count>
__device__ __forceinline__ void round_to(Pack<T, count>& pack, const float (&values)[count]) {
  if constexpr (count % 2) {
#pragma unroll
    for (int k = 0; k < count; ++k) store(pack.element + k, values[k]);
  } else {
#pragma unroll
    for (int k = 0; k < count; k += 2) {
      const auto pair = round_pair(T{}, values[k], values[k + 1]);
      pack.element[k] = pair.x, pack.element[k + 1] = pair.y;
    }
  }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = warp / 2; offset; offset /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = warp / 2; offset; offset /= 2) value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  return value;
}

// Whether accesses of `width` bytes are possible: the address and every stride in bytes are multiples of it.
template <int width, class... Strides>
bool aligned_to(const void* data, Strides... bytes) {
  return ((reinterpret_cast<uintptr_t>(data) | ... | static_cast<uintptr_t>(bytes)) % width) == 0;
}
template <class... Strides>
bool aligned16(const void* data, Strides... bytes) {
  return aligned_to<16>(data, bytes...);
}

// Calls body with a value of the element's type.
template <class Body>
void with_type(Element element, Body body) {
  switch (element) {
    case Element::float32: return body(float{});
    case Element::bfloat16: return body(__nv_bfloat16{});
    case Element::float16: return body(__half{});
  }
}

// Calls body with p as a pointer to the element's type, in a kernel.
template <class Body>
__device__ __forceinline__ void with_pointer(Element element, const void* p, Body body) {
  switch (element) {
    case Element::float32: return body(static_cast<const float*>(p));
    case Element::bfloat16: return body(static_cast<const __nv_bfloat16*>(p));
    case Element::float16: return body(static_cast<const __half*>(p));
  }
}

constexpr int64_t size_of(Element element) { return element == Element::float32 ? 4 : 2; }

inline bool aligned_rows(const Rows& rows) {
  return aligned16(rows.data, rows.batch_stride * size_of(rows.element), rows.row_stride * size_of(rows.element));
}
template <int width = 16>
bool aligned_heads(const Heads& heads, int64_t size) {
  return aligned_to<width>(heads.data, heads.batch_stride * size, heads.row_stride * size, heads.head_stride * size);
}

struct Grid {
  int64_t blocks;
  int64_t batch = 1;  // the grid's second dimension
  int threads;
  bool cooperative = false;
};

// Starts a kernel on a stream given as an integer; throws std::runtime_error where the driver refuses.
template <class... Parameters>
void launch(const char* op, void (*kernel)(Parameters...), const Grid& grid, uintptr_t stream,
            std::common_type_t<Parameters>... arguments) {
  if (grid.blocks > INT32_MAX || grid.batch > 65535)
    throw std::runtime_error(std::string(op) + ": a grid of " + std::to_string(grid.blocks) + " x " +
                             std::to_string(grid.batch) + " blocks, CUDA takes at most 2147483647 x 65535");
  cudaLaunchAttribute cooperative{};
  cooperative.id = cudaLaunchAttributeCooperative;
  cooperative.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.batch));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &cooperative;
  config.numAttrs = grid.cooperative ? 1 : 0;
  if (const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...); error != cudaSuccess)
    throw std::runtime_error(std::string(op) + ": " + cudaGetErrorString(error));
}

}  // namespace dsa_rt::cuda
