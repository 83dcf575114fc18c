// fp16 as CUDA has it.
#pragma once

#include "cuda_runtime.h"
#include "half.h"

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline float __half2float(__half value) { return emulator::half_value(value.bits); }
inline __half __float2half_rn(float value) { return {emulator::half_bits(value)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
