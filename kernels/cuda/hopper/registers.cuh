// Arithmetic on registers that has an instruction of its own, and exchanges within a quad (lanes 4 i to 4 i + 3).
#pragma once

#include <stdint.h>

#include "../../element.h"

namespace dsa_rt::cuda::hopper {

// 2^x within 2 units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 unit in the last place, for x in 2^-126 to 2^126; infinite for 0.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats rounded to nearest even as bf16, `low` in the low half.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The same as fp16: infinite from 65520 on, multiples of 2^-24 below 2^-14.
__device__ __forceinline__ uint32_t pack_fp16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Either, as `element` says.
template <Element element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  static_assert(element == Element::bfloat16 || element == Element::float16);
  return element == Element::bfloat16 ? pack_bf16(low, high) : pack_fp16(low, high);
}

__device__ __forceinline__ float exchange(float value, int lane_mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lane_mask);
}

__device__ __forceinline__ uint32_t exchange(uint32_t value, int lane_mask) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, lane_mask);
}

// The same value in all lanes of a warp, in a form that the compiler knows to be so.
__device__ __forceinline__ int uniform(int value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

}  // namespace dsa_rt::cuda::hopper
