// quantize_rows, written once over Lanes and compiled once per instruction set: a translation unit includes this file,
// has its flags in CMakeLists.txt, and exports `quantize_rows`.
//
// Bytes per element of s: s read, 1 written; a head's row is read a second time from L1. Quotients are divisions, not
// products with 1 / scale, whose roundings would differ: they bound it, 32 of them for every 32 elements.
#pragma once

#include <math.h>

#include "float8.h"
#include "elements.h"
#include "quantize.h"
#include "rows.h"

namespace dsa_rt::cpu {
namespace {

constexpr float float8_largest = 448.0f, smallest_normal = 1.17549435e-38f;

typedef uint8_t Bytes __attribute__((vector_size(vector_bytes / 4)));

// The lower bytes of words; see lanes.h for why not __builtin_convertvector alone.
DSA_RT_INLINE Bytes narrow_to_bytes(Words words) {
#if defined(__AVX512F__)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)words);
#elif defined(__AVX2__)
  const __m128i halves = (__m128i)narrow(words);
  const __m128i bytes = _mm_packus_epi16(halves, halves);
  Bytes packed;
  memcpy(&packed, &bytes, sizeof packed);
  return packed;
#else
  return __builtin_convertvector(words, Bytes);
#endif
}

// The code of the nearest E4M3 number, to even; NaN for infinity and NaN. A finite quotient is at most 448, up to its
// rounding, so none has to be cut.
DSA_RT_INLINE Words float8_codes(Floats value) {
  const Words magnitude = (Words)value & 0x7FFFFFFFu;
  const Words normal = ((magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
  const Words subnormal = (Words)((Floats)magnitude + 16384.0f) - 0x46800000u;  // rounded to multiples of 2^-9
  const Words nearest = magnitude < 0x3C800000u ? subnormal : normal;           // 2^-6
  return magnitude >= 0x7F800000u ? Words{} + 0x7Fu : nearest | (((Words)value >> 24) & 0x80u);
}

DSA_RT_INLINE void store_codes(Float8* p, const Lanes& value, Whole) {
#pragma GCC unroll 8
  for (int i = 0; i < Lanes::parts; ++i) {
    const Bytes codes = narrow_to_bytes(float8_codes(value.part[i]));
    memcpy(p + i * vector_floats, &codes, sizeof codes);
  }
}
inline void store_codes(Float8* p, const Lanes& value, Some block) {
  Float8 codes[Lanes::count];
  store_codes(codes, value, Whole{});
  for (int64_t l = 0; l < block.count; ++l) p[l] = codes[l];
}

// The scale of a head's row. Infinity and NaN do not count: the rest of their row is what it would be without them.
template <class T>
DSA_RT_INLINE float scale_of(const T* row, int64_t dim) {
  Lanes most = all(0.0f);
  for_blocks(dim, [&](int64_t i, auto block) {
    const Lanes size = absolute(load(row + i, block));
    most = each_part([&](int n) {
      const Floats counted = size.part[n] < INFINITY ? size.part[n] : Floats{};
      return counted > most.part[n] ? counted : most.part[n];
    });
  });
  const float scale = largest(most) / float8_largest;
  return scale < smallest_normal ? smallest_normal : scale;
}

void quantize_rows(const QuantizeRowsParams& p, int64_t begin, int64_t end) {
  with_type(p.element, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / p.active, token = i % p.active, place = p.slots ? p.slots[token] : token;
      const T* row = static_cast<const T*>(p.rows.data) + batch * p.rows.batch_stride + token * p.rows.row_stride;
      Float8* out = static_cast<Float8*>(p.out.data) + batch * p.out.batch_stride + place * p.out.row_stride;
      float* scales = p.scale + batch * p.scale_batch_stride + place * p.scale_row_stride;
      for (int64_t h = 0; h < p.heads; ++h, row += p.rows.head_stride, out += p.out.head_stride) {
        scales[h] = scale_of(row, p.dim);
        const Floats scale = all_of(scales[h]);
        for_blocks(p.dim, [&](int64_t d, auto block) {
          const Lanes value = load(row + d, block);
          store_codes(out + d, each_part([&](int n) { return value.part[n] / scale; }), block);
        });
      }
    }
  });
}

}  // namespace
}  // namespace dsa_rt::cpu
