// AVX-512 with bf16 dot products: vdpbf16ps adds two products of bf16 to each fp32 lane, so that an operand's unit is a
// pair of bf16 along the sum: two channels of a query or key, two keys of weights or values.
#include "attention_impl.h"
#include "vectors_avx512.h"

namespace dsa_rt::cpu {
namespace {

// The bf16 number of each E4M3 code, without its sign.
struct Bfloat16OfFloat8 {
  alignas(64) uint16_t number[128]{};
  constexpr Bfloat16OfFloat8() {
    constexpr uint16_t subnormal[8] = {0, 0x3B00, 0x3B80, 0x3BC0, 0x3C00, 0x3C20, 0x3C40, 0x3C60};  // m·2^-9
    for (int code = 0; code < 127; ++code)
      number[code] = code < 8 ? subnormal[code] : static_cast<uint16_t>((code << 4) + 0x3C00);
    number[127] = 0x7FC0;
  }
};
constexpr Bfloat16OfFloat8 bfloat16_of_float8;

// Thirty-two codes, in the lower bytes of 16-bit lanes, as bf16; exact.
DSA_RT_INLINE __m512i bfloat16_numbers(__m512i codes) {
  const uint16_t* table = bfloat16_of_float8.number;
  const auto part = [&](int i) { return _mm512_load_si512(table + 32 * i); };
  const __m512i low = _mm512_permutex2var_epi16(part(0), codes, part(1));  // by the lower 6 bits of a code
  const __m512i high = _mm512_permutex2var_epi16(part(2), codes, part(3));
  const __mmask32 above = _mm512_test_epi16_mask(codes, _mm512_set1_epi16(0x40));
  const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(codes, 8), _mm512_set1_epi16(static_cast<short>(0x8000)));
  return _mm512_or_si512(_mm512_mask_mov_epi16(low, above, high), sign);
}

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

  static void pack_keys(Unit* to, const Float8* rows, int64_t stride, int64_t count, int64_t dim) {
    // From four codes in a 32-bit lane the first two, or the last two, a 16-bit lane each.
    const __m128i first = _mm_setr_epi32(static_cast<int>(0x80018000u), static_cast<int>(0x80058004u),
                                         static_cast<int>(0x80098008u), static_cast<int>(0x800D800Cu));
    const __m512i pairs[2] = {_mm512_broadcast_i32x4(first),
                              _mm512_broadcast_i32x4(_mm_add_epi32(first, _mm_set1_epi32(0x00020002)))};
    for (int64_t i = 0; i < width; i += lanes) {
      const Float8* key[lanes];
      for (int64_t j = 0; j < lanes; ++j) key[j] = rows + (i + j < count ? i + j : count - 1) * stride;
      for (int64_t d = 0; d < dim; d += 16) {
        const int64_t left = dim - d;
        const auto channels = static_cast<__mmask16>(left < 16 ? (1 << left) - 1 : 0xFFFF);
        transpose([&](int j) { return _mm_maskz_loadu_epi8(channels, key[j] + d); },
                  [&](int four, Vec v) {
                    for (int half = 0; half < 2; ++half)
                      if (const int64_t pair = 2 * four + half; 2 * pair < left)
                        _mm512_storeu_si512(to + (d / 2 + pair) * width + i,
                                            bfloat16_numbers(_mm512_shuffle_epi8((__m512i)v, pairs[half])));
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

  static void pack_values(Unit* to, const Float8* rows, int64_t stride, int64_t keys, int64_t channels, int64_t dim) {
    for (int64_t i = 0; i < keys; i += 2)
      for (int64_t d = 0; d < channels; d += lanes, to += lanes) {
        const int64_t left = dim - d;
        const unsigned mask = left < lanes ? (1u << left) - 1 : 0xFFFFu;
        const Float8* row = rows + i * stride + d;
        const auto first = _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), row);
        const auto second = _mm_maskz_loadu_epi8(static_cast<__mmask16>(i + 1 < keys ? mask : 0), row + stride);
        _mm512_storeu_si512(
            to, bfloat16_numbers(_mm512_or_si512(_mm512_cvtepu8_epi32(first),
                                                 _mm512_slli_epi32(_mm512_cvtepu8_epi32(second), 16))));
      }
  }
};

}  // namespace

const AttentionKernel attention_avx512_bf16 = attention_kernel<Bf16Pairs, BFloat16>;
const AttentionKernel attention_avx512_bf16_fp8 = attention_kernel<Bf16Pairs, BFloat16, Float8>;

}  // namespace dsa_rt::cpu
