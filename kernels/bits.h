// fp32 as its bits and back, and the inlining that C++ and CUDA share.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define DSA_RT_INLINE static __device__ __forceinline__
#else
#define DSA_RT_INLINE static inline __attribute__((always_inline))
#endif

namespace dsa_rt {

DSA_RT_INLINE float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

DSA_RT_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

}  // namespace dsa_rt
