// A model of kernels/cuda/hopper/registers.cuh.
#pragma once

#include <string.h>

#include "../../element.h"
#include "device.h"
#include "emulator/half.h"

namespace dsa_rt::cuda::hopper {

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 1.17549435e-38f ? 0.0f : y;  // false for NaN
}

inline float reciprocal(float x) { return 1.0f / x; }

inline uint32_t bf16_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return 0x7FFF;
  return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

inline float bf16_value(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }
inline uint32_t pack_fp16(float low, float high) {
  return ::emulator::half_bits(low) | (uint32_t)::emulator::half_bits(high) << 16;
}

template <Element element>
uint32_t pack_pair(float low, float high) {
  return element == Element::bfloat16 ? pack_bf16(low, high) : pack_fp16(low, high);
}

inline float value_of(Element element, uint16_t bits) {
  return element == Element::bfloat16 ? bf16_value(bits) : ::emulator::half_value(bits);
}

template <class T>
T exchange(T value, int lane_mask) {
  const T* all = ::emulated::model<::emulated::Collective<T, 32>>().all(value);
  return all[(::emulated::block->fiber().index.x % 32) ^ lane_mask];
}

inline int uniform(int value) { return ::emulated::model<::emulated::Collective<int, 32>>().all(value)[0]; }

}  // namespace dsa_rt::cuda::hopper
