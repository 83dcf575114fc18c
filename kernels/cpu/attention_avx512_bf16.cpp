// AVX-512 with bf16 dot products: vdpbf16ps adds two products of bf16 to each fp32 lane, so that an operand's unit is a
// pair of bf16 along the sum: two channels of a query or key, two keys of weights or values.
#include "attention_impl.h"
#include "vectors_avx512.h"

namespace dsa_rt::cpu {
namespace {

struct Bf16Pairs : Avx512 {
  using Unit = uint32_t;
  using Units = __m512i;
  static constexpr int group = 2;
  static constexpr int width = columns * lanes;

  static Units units(const Unit* p) { return _mm512_loadu_si512(p); }
  static Units repeat(const Unit* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static Vec multiply_add(Vec total, Units a, Units b) { return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b); }
  static void store_weights(Unit* to, Vec a, Vec b) { _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(b, a)); }

  static void pack_rows(Unit* to, const BFloat16* rows, int64_t stride, int64_t count, int64_t dim) {
    for (int64_t r = 0; r < count; ++r, to += (dim + 1) / 2) {
      if (dim % 2) to[dim / 2] = 0;
      memcpy(to, rows + r * stride, static_cast<size_t>(dim) * 2);
    }
  }

  // A panel [channel pairs][width]; after `count` keys the last one is repeated.
  static void pack_keys(Unit* to, const BFloat16* rows, int64_t stride, int64_t count, int64_t dim) {
    for (int64_t i = 0; i < width; i += lanes) {
      const BFloat16* key[lanes];
      for (int64_t j = 0; j < lanes; ++j) key[j] = rows + (i + j < count ? i + j : count - 1) * stride;
      for (int64_t d = 0; d < dim; d += 8) {
        const int64_t left = dim - d;
        const __mmask8 channels = static_cast<__mmask8>(left < 8 ? (1 << left) - 1 : 0xFF);
        transpose([&](int j) { return _mm_maskz_loadu_epi16(channels, key[j] + d); },
                  [&](int pair, Vec v) {
                    if (2 * pair < left) _mm512_storeu_ps(to + (d / 2 + pair) * width + i, v);
                  });
      }
    }
  }

  // A panel [key pairs][channels], zeros from channel `dim` on and for the missing half of a last pair.
  static void pack_values(Unit* to, const BFloat16* rows, int64_t stride, int64_t keys, int64_t channels, int64_t dim) {
    for (int64_t i = 0; i < keys; i += 2)
      for (int64_t d = 0; d < channels; d += lanes, to += lanes) {
        const int64_t left = dim - d;
        const unsigned mask = left < lanes ? (1u << left) - 1 : 0xFFFFu;
        const BFloat16* row = rows + i * stride + d;
        const auto first = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), row);
        const auto second = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(i + 1 < keys ? mask : 0), row + stride);
        _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                                                _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16)));
      }
  }
};

}  // namespace

const AttentionKernel attention_avx512_bf16 = attention_kernel<Bf16Pairs, BFloat16>;

}  // namespace dsa_rt::cpu
