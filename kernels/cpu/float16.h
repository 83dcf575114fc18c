// fp16 elements as numbers: by the instructions of F16C where a translation unit has them, else by integers, with the same
// bits. Internal linkage: see philox.h.
#pragma once

#include "../bits.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace dsa_rt::cpu {
namespace {

struct Float16 {
  uint16_t bits;
};

// The number of the fp16 element in each 32-bit lane of a vector. Exact; a NaN becomes a quiet one. Without fp32
// subnormals, which a thread may be told to flush: those of fp16 are (1 + m/1024)·2^-14 - 2^-14.
template <class Vec>
DSA_RT_INLINE Vec float16_numbers(Vec elements) {
  typedef uint32_t Words __attribute__((vector_size(sizeof(Vec))));
  const Words element = (Words)elements, magnitude = element & 0x7FFFu, sign = (element & 0x8000u) << 16;
  const Words normal = (magnitude << 13) + 0x38000000u;
  const Words subnormal = (Words)((Vec)((magnitude << 13) + 0x38800000u) - 0x1p-14f);
  const Words quiet = magnitude > 0x7C00u ? Words{} + 0x00400000u : Words{};
  const Words special = (magnitude << 13) | 0x7F800000u | quiet;
  const Words finite = magnitude < 0x0400u ? subnormal : normal;
  return (Vec)((magnitude < 0x7C00u ? finite : special) | sign);
}

// The nearest fp16 element, to even, in the lower half of each lane; infinity from 65520 on; a NaN becomes a quiet one
// and keeps its sign and the upper bits of its mantissa.
template <class Vec>
DSA_RT_INLINE Vec float16_elements(Vec value) {
  typedef uint32_t Words __attribute__((vector_size(sizeof(Vec))));
  const Words word = (Words)value, magnitude = word & 0x7FFFFFFFu;
  const Words normal = ((magnitude + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13) - (112u << 10);
  const Words subnormal = (Words)((Vec)magnitude + 0.5f) - 0x3F000000u;  // rounded to multiples of 2^-24
  const Words finite = magnitude < 0x38800000u ? subnormal : normal;     // 2^-14
  const Words number = magnitude < 0x47800000u ? finite : Words{} + 0x7C00u;
  const Words nan = ((magnitude >> 13) & 0x03FFu) | 0x7E00u;
  return (Vec)((magnitude > 0x7F800000u ? nan : number) | ((word >> 16) & 0x8000u));
}

#if defined(__F16C__)
inline float load(const Float16* p) { return _cvtsh_ss(p->bits); }
inline void store(Float16* p, float value) { p->bits = (uint16_t)_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
#else
typedef float FourFloats __attribute__((vector_size(16)));
inline float load(const Float16* p) { return float16_numbers(FourFloats{bits_to_float(p->bits)})[0]; }
inline void store(Float16* p, float value) {
  p->bits = (uint16_t)float_to_bits(float16_elements(FourFloats{value})[0]);
}
#endif

// Rows of elements to fp32 numbers and back. Compilers make vectors of other types by themselves.
template <class T>
inline void load_row(float* to, const T* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = load(from + i);
}
template <class T>
inline void store_row(T* to, const float* from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(to + i, from[i]);
}
#if defined(__F16C__)
inline void load_row(float* to, const Float16* from, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
  for (; i < count; ++i) to[i] = load(from + i);
}
inline void store_row(Float16* to, const float* from, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) store(to + i, from[i]);
}
#endif

}  // namespace
}  // namespace dsa_rt::cpu
