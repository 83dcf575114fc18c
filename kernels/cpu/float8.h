// Elements in E4M3 (float8_e4m3fn: 4 bits of exponent, 3 of mantissa, no infinity, NaN 0x7F) as numbers. Internal
// linkage: see philox.h.
#pragma once

#include "../bits.h"

namespace dsa_rt::cpu {
namespace {

struct Float8 {
  uint8_t bits;
};

// Exact. Without fp32 subnormals, which a thread may be told to flush: those of E4M3 are (1 + m/8)·2^-6 - 2^-6.
inline float load(const Float8* p) {
  const uint32_t magnitude = p->bits & 0x7Fu, sign = (p->bits & 0x80u) << 24;
  const uint32_t normal = (magnitude << 20) + 0x3C000000u;
  const uint32_t subnormal = float_to_bits(bits_to_float((magnitude << 20) + 0x3C800000u) - 0.015625f);
  const uint32_t number = magnitude < 8 ? subnormal : normal;
  return bits_to_float((magnitude == 0x7Fu ? 0x7FC00000u : number) | sign);
}

// The same of a code in each 32-bit lane of a vector.
template <class Vec>
DSA_RT_INLINE Vec float8_numbers(Vec codes) {
  typedef uint32_t Words __attribute__((vector_size(sizeof(Vec))));
  const Words code = (Words)codes, magnitude = code & 0x7Fu, sign = (code & 0x80u) << 24;
  const Words normal = (magnitude << 20) + 0x3C000000u;
  const Words subnormal = (Words)((Vec)((magnitude << 20) + 0x3C800000u) - 0.015625f);
  const Words number = magnitude < 8u ? subnormal : normal;
  return (Vec)((magnitude == 0x7Fu ? Words{} + 0x7FC00000u : number) | sign);
}

}  // namespace
}  // namespace dsa_rt::cpu
