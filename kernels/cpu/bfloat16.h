// fp32 and bf16 elements as numbers. Internal linkage: see philox.h.
#pragma once

#include "../bits.h"

namespace dsa_rt::cpu {
namespace {

struct BFloat16 {
  uint16_t bits;
};

inline float load(const float* p) { return *p; }
inline float load(const BFloat16* p) { return bits_to_float((uint32_t)p->bits << 16); }
inline void store(float* p, float value) { *p = value; }
inline void store(BFloat16* p, float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t nearest_even = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  p->bits = (uint16_t)((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest_even);
}

}  // namespace
}  // namespace dsa_rt::cpu
