// Counter-based standard normals, the same bits on CPU and CUDA: Philox4x32-10 (Salmon et al., SC11) and Box-Muller
// over polynomials. dsa_rt/reference/step.py is the definition, and the order of operations here is the one there.
//
// Only operations that IEEE 754 rounds exactly are used. Compile with -ffp-contract=off (nvcc: -fmad=false): a fused
// multiply-add would change bits. Everything has internal linkage, since each translation unit that includes this
// file may be compiled for another instruction set and the linker must not merge them.
#pragma once

#include <math.h>

#include "bits.h"

namespace dsa_rt {

struct PhiloxWords {
  uint32_t w0, w1, w2, w3;
};

DSA_RT_INLINE uint32_t philox_high(uint32_t a, uint32_t b) { return (uint32_t)(((uint64_t)a * b) >> 32); }

DSA_RT_INLINE PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint32_t high0 = philox_high(0xD2511F53u, counter.w0), low0 = 0xD2511F53u * counter.w0;
    const uint32_t high1 = philox_high(0xCD9E8D57u, counter.w2), low1 = 0xCD9E8D57u * counter.w2;
    counter = {high1 ^ counter.w1 ^ key0, low1, high0 ^ counter.w3 ^ key1, low0};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

DSA_RT_INLINE float exact_sqrt(float value) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(value);
#else
  return sqrtf(value);
#endif
}

// Nearest fp32 of a 32-bit word. Both halves are exact, so that their sum is the only rounding; written this way
// because AVX2 converts signed integers only.
DSA_RT_INLINE float word_to_float(uint32_t word) {
  return (float)(int32_t)(word >> 16) * 65536.0f + (float)(int32_t)(word & 0xFFFFu);
}

// sqrt(-2·log(u)), u = (word | 1)·2^-32. The logarithm is taken of u·2^32 = (1 + z)·2^exponent with 1 + z in
// [sqrt(1/2), sqrt(2)); 0x3F3504F3 are the bits of sqrt(1/2).
DSA_RT_INLINE float normal_radius(uint32_t word) {
  const uint32_t bits = float_to_bits(word_to_float(word | 1u));
  const int32_t exponent = (int32_t)(bits - 0x3F3504F3u) >> 23;
  const float z = bits_to_float(bits - ((uint32_t)exponent << 23)) - 1.0f;
  float p = 0.08979375660419464f;
  p = p * z - 0.1442677527666092f;
  p = p * z + 0.1488369256258011f;
  p = p * z - 0.16551804542541504f;
  p = p * z + 0.19963477551937103f;
  p = p * z - 0.25002583861351013f;
  p = p * z + 0.3333393335342407f;
  p = p * z - 0.4999998211860657f;
  const float log_mantissa = z + z * z * p;
  const float log_u = (float)(exponent - 32) * 0.6931471824645996f + log_mantissa;
  return exact_sqrt(-2.0f * log_u);
}

struct SinCos {
  float sin, cos;
};

// The top two bits choose the quadrant, the others (as a signed fraction) the angle within ±π/4.
DSA_RT_INLINE SinCos uniform_sin_cos(uint32_t word) {
  const float angle = (float)(int32_t)(word << 2) * 3.65729529994141e-10f;
  const float square = angle * angle;
  float s = -0.00019520237401593477f;
  s = s * square + 0.0083322050049901f;
  s = s * square - 0.16666655242443085f;
  float c = 2.4461030989186838e-05f;
  c = c * square - 0.0013887593522667885f;
  c = c * square + 0.041666653007268906f;
  const uint32_t sine = float_to_bits(angle + angle * square * s);
  const uint32_t cosine = float_to_bits((1.0f - 0.5f * square) + square * square * c);
  const uint32_t odd = 0u - ((word >> 30) & 1u);  // all ones in the quadrants that swap sine and cosine
  const uint32_t difference = (sine ^ cosine) & odd;
  const uint32_t sine_sign = word & 0x80000000u;                       // quadrants 2 and 3
  const uint32_t cosine_sign = (word ^ (word << 1)) & 0x80000000u;  // quadrants 1 and 2
  return {bits_to_float(sine ^ difference ^ sine_sign), bits_to_float(cosine ^ difference ^ cosine_sign)};
}

struct Normals {
  float n0, n1, n2, n3;
};

// Elements 4·block … 4·block + 3 of a token's row of normals.
DSA_RT_INLINE Normals philox_normals(uint32_t block, uint32_t draw, uint64_t token, uint64_t seed) {
  const PhiloxWords words = philox({block, draw, (uint32_t)token, (uint32_t)(token >> 32)}, (uint32_t)seed, (uint32_t)(seed >> 32));
  const float radius0 = normal_radius(words.w0), radius1 = normal_radius(words.w2);
  const SinCos turn0 = uniform_sin_cos(words.w1), turn1 = uniform_sin_cos(words.w3);
  return {radius0 * turn0.cos, radius0 * turn0.sin, radius1 * turn1.cos, radius1 * turn1.sin};
}

}  // namespace dsa_rt
