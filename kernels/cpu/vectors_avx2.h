// Eight fp32 lanes of AVX2 and FMA.
#pragma once

#include <immintrin.h>

#include <math.h>

#include "attention_float32.h"

namespace dsa_rt::cpu {
namespace {

struct Avx2 {
  using Vec = __m256;
  static constexpr int lanes = 8, columns = 2;  // 6 × 2 sums, 2 of the panel, 1 of the rows: 15 of 16 registers

  static Vec load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm256_storeu_ps(p, v); }
  static Vec all(float value) { return _mm256_set1_ps(value); }
  static Vec multiply_add_floats(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
  static float largest(Vec v) {
    __m128 m = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    m = _mm_max_ps(m, _mm_movehl_ps(m, m));
    return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
  }
  static Vec finite_or_zero(Vec v) { return _mm256_and_ps(v, _mm256_cmp_ps(v, all(-INFINITY), _CMP_NEQ_UQ)); }
  static Vec exp2(Vec t) {
    const Vec clamped = _mm256_max_ps(all(-126.0f), t);  // the second operand where one is NaN
    const Vec n = _mm256_round_ps(clamped, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    const Vec value = exp2_polynomial<Avx2>(clamped - n) * _mm256_castsi256_ps(exponent);
    return _mm256_and_ps(value, _mm256_cmp_ps(t, all(-126.0f), _CMP_NLT_UQ));
  }

  static __m128 four(const float* p) { return _mm_loadu_ps(p); }
  static __m128 four(const BFloat16* p) {
    const __m128i bits = _mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm_castsi128_ps(_mm_slli_epi32(bits, 16));
  }
  static __m128 four(const Float16* p) {
    return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static __m128 four(const Float8* p) {
    int codes;
    memcpy(&codes, p, sizeof codes);
    return _mm_castsi128_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(codes)));
  }
  // Keys 0 and 4 share a register from the start, so that no later step crosses 128-bit lanes.
  template <class Part, class Put>
  static void transpose(Part part, Put put) {
    Vec row[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) row[j] = _mm256_insertf128_ps(_mm256_castps128_ps256(part(j)), part(j + 4), 1);
    const Vec low01 = _mm256_unpacklo_ps(row[0], row[1]), high01 = _mm256_unpackhi_ps(row[0], row[1]);
    const Vec low23 = _mm256_unpacklo_ps(row[2], row[3]), high23 = _mm256_unpackhi_ps(row[2], row[3]);
    put(0, _mm256_shuffle_ps(low01, low23, 0x44));
    put(1, _mm256_shuffle_ps(low01, low23, 0xEE));
    put(2, _mm256_shuffle_ps(high01, high23, 0x44));
    put(3, _mm256_shuffle_ps(high01, high23, 0xEE));
  }
};

}  // namespace
}  // namespace dsa_rt::cpu
