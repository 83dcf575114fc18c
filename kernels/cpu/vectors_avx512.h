// Sixteen fp32 lanes of AVX-512 F, BW, DQ and VL.
#pragma once

#include <immintrin.h>

#include "attention_float32.h"

namespace dsa_rt::cpu {
namespace {

struct Avx512 {
  using Vec = __m512;
  static constexpr int lanes = 16, columns = 4;  // 6 × 4 sums, 4 of the panel, 1 of the rows: 29 of 32 registers

  static Vec load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
  static Vec all(float value) { return _mm512_set1_ps(value); }
  static Vec multiply_add_floats(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
  static Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
  static float largest(Vec v) { return _mm512_reduce_max_ps(v); }
  static Vec finite_or_zero(Vec v) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, all(-INFINITY), _CMP_NEQ_UQ), v);
  }
  static Vec exp2(Vec t) {
    const Vec f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);  // 0 for -inf
    return _mm512_scalef_ps(exp2_polynomial<Avx512>(f), t - f);
  }

  static __m128i four(const float* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static __m128i four(const BFloat16* p) {
    return _mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 16);
  }
  static __m128i four(const Float16* p) {
    return _mm_castps_si128(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static __m128i four(const Float8* p) {
    int codes;
    memcpy(&codes, p, sizeof codes);
    return _mm_cvtepu8_epi32(_mm_cvtsi32_si128(codes));
  }
  // Keys 0, 4, 8 and 12 share a register from the start, so that no later step crosses 128-bit lanes.
  template <class Part, class Put>
  static void transpose(Part part, Put put) {
    __m512i row[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      row[j] = _mm512_castsi128_si512(part(j));
      row[j] = _mm512_inserti32x4(row[j], part(j + 4), 1);
      row[j] = _mm512_inserti32x4(row[j], part(j + 8), 2);
      row[j] = _mm512_inserti32x4(row[j], part(j + 12), 3);
    }
    const __m512i low01 = _mm512_unpacklo_epi32(row[0], row[1]), high01 = _mm512_unpackhi_epi32(row[0], row[1]);
    const __m512i low23 = _mm512_unpacklo_epi32(row[2], row[3]), high23 = _mm512_unpackhi_epi32(row[2], row[3]);
    put(0, (Vec)_mm512_unpacklo_epi64(low01, low23));
    put(1, (Vec)_mm512_unpackhi_epi64(low01, low23));
    put(2, (Vec)_mm512_unpacklo_epi64(high01, high23));
    put(3, (Vec)_mm512_unpackhi_epi64(high01, high23));
  }
};

}  // namespace
}  // namespace dsa_rt::cpu
