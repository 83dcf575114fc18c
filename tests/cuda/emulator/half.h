// fp16 as its bits and back, for the models of CUDA beside this file and in ../hopper.
#pragma once

#include <cstdint>
#include <cstring>

namespace emulator {

inline float half_value(uint16_t half) {
  const uint32_t magnitude = half & 0x7FFFu, sign = (half & 0x8000u) << 16;
  uint32_t bits = magnitude << 13;
  if (magnitude >= 0x7C00) {
    bits += 224u << 23;  // infinity and NaN
  } else if (magnitude >= 0x0400) {
    bits += 112u << 23;
  } else {
    const float wide = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &wide, sizeof bits);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Rounded to nearest, to even; infinite from 65520 on.
inline uint16_t half_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t magnitude = bits & 0x7FFFFFFFu, sign = bits >> 16 & 0x8000u;
  if (magnitude > 0x7F800000u) return 0x7FFF;
  if (magnitude >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520
  uint32_t half = ((magnitude + 0xFFFu + (magnitude >> 13 & 1)) >> 13) - (112u << 10);
  if (magnitude < 0x38800000u) {  // 2^-14
    float shifted;
    std::memcpy(&shifted, &magnitude, sizeof shifted);
    shifted += 0.5f;  // to multiples of 2^-24
    std::memcpy(&half, &shifted, sizeof half);
    half -= 0x3F000000u;
  }
  return static_cast<uint16_t>(sign | half);
}

}  // namespace emulator
