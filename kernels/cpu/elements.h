// Blocks of 32 elements of a row, read and written as Lanes: fp32, bf16 and fp16, whole or the first few, through the
// caches or past them. Internal linkage: see philox.h.
#pragma once

#include <type_traits>

#include "bfloat16.h"
#include "float16.h"
#include "lanes.h"

namespace dsa_rt::cpu {
namespace {

#if defined(__AVX512F__)
// One instruction for each vector, where widening and shifting are two: words `first`... of the 32 halves, each in the
// upper half of its word; and back, the upper halves of the words of two vectors.
typedef uint16_t Halves32 __attribute__((vector_size(64)));
template <int first, int... half>
DSA_RT_INLINE Floats upper_halves(__m512i halves, std::integer_sequence<int, half...>) {
  const Halves32 source = {(uint16_t)(first + half / 2)...};
  return (Floats)_mm512_maskz_permutexvar_epi16(0xAAAAAAAAu, (__m512i)source, halves);
}
template <int... half>
DSA_RT_INLINE __m512i pack_upper_halves(Words low, Words high, std::integer_sequence<int, half...>) {
  const Halves32 source = {(uint16_t)(2 * half + 1)...};
  return _mm512_permutex2var_epi16((__m512i)low, (__m512i)source, (__m512i)high);
}
constexpr std::make_integer_sequence<int, 32> all_halves;
#endif

// How many elements of a block of 32 exist: all, or the first few at the end of a row.
struct Whole {};
struct Some {
  int64_t count;
};

DSA_RT_INLINE Floats load_vector(const float* p) {
  Floats values;
  memcpy(&values, p, sizeof values);
  return values;
}
DSA_RT_INLINE Floats load_vector(const BFloat16* p) {
  Halves halves;
  memcpy(&halves, p, sizeof halves);
  return (Floats)(widen(halves) << 16);
}

// Without instructions for it, fp16 takes a dozen operations a vector: one copy of them for a block, not one wherever a
// block is read or written.
#if defined(__F16C__)
#define DSA_RT_FLOAT16 DSA_RT_INLINE
#else
#define DSA_RT_FLOAT16 __attribute__((noinline, unused)) static
#endif

DSA_RT_INLINE Floats float16_vector(Halves halves) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps((__m256i)halves);
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps((__m128i)halves);
#else
  return float16_numbers((Floats)widen(halves));
#endif
}
DSA_RT_INLINE Floats load_vector(const Float16* p) {
  Halves halves;
  memcpy(&halves, p, sizeof halves);
  return float16_vector(halves);
}

DSA_RT_INLINE Lanes load(const float* p, Whole) {
  return each_part([&](int i) { return load_vector(p + i * vector_floats); });
}
DSA_RT_INLINE Lanes load(const BFloat16* p, Whole) {
#if defined(__AVX512F__)
  const __m512i halves = _mm512_loadu_si512(p);
  return {{upper_halves<0>(halves, all_halves), upper_halves<16>(halves, all_halves)}};
#else
  return each_part([&](int i) { return load_vector(p + i * vector_floats); });
#endif
}
DSA_RT_FLOAT16 Lanes load(const Float16* p, Whole) {
  return each_part([&](int i) { return load_vector(p + i * vector_floats); });
}
// Lanes that do not exist get `missing`.
template <class T>
DSA_RT_INLINE Lanes load(const T* p, Whole, float) {
  return load(p, Whole{});
}
template <class T>
inline Lanes load(const T* p, Some block, float missing = 0.0f) {
  float values[Lanes::count];
  for (int l = 0; l < Lanes::count; ++l) values[l] = l < block.count ? load(p + l) : missing;
  return load(values, Whole{});
}

// Words whose upper halves are the nearest bf16, to even; any NaN becomes the canonical one. The lower halves are left
// over.
DSA_RT_INLINE Words bfloat16_words(Floats value) {
  const Words words = (Words)value;
  const Words nearest = words + 0x7FFFu + ((words >> 16) & 1u);
  return value != value ? Words{} + 0x7FC00000u : nearest;
}

#if defined(__AVX512BF16__)
// Thirty-two bf16 by one instruction, false where a number is one that it treats otherwise: it takes a subnormal number
// for 0 and keeps the bits of a NaN.
DSA_RT_INLINE bool convert(const Lanes& value, __m512i* halves) {
  constexpr int quiet_nan = 0x01, subnormal = 0x20, signalling_nan = 0x80;
  constexpr int kinds = quiet_nan | subnormal | signalling_nan;
  const __m512 low = (__m512)value.part[0], high = (__m512)value.part[1];
  const __mmask16 other = _mm512_fpclass_ps_mask(low, kinds) | _mm512_fpclass_ps_mask(high, kinds);
  *halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  return __builtin_expect(!other, 1);
}
#endif

DSA_RT_INLINE Halves float16_halves(Floats value) {
#if defined(__AVX512F__)
  return (Halves)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (Halves)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
  return narrow((Words)float16_elements(value));
#endif
}

DSA_RT_FLOAT16 Lanes float16_rounded(const Lanes& value) {
  return each_part([&](int i) { return float16_vector(float16_halves(value.part[i])); });
}

// The value as an element of type T holds it.
template <class T>
DSA_RT_INLINE Lanes rounded(const Lanes& value) {
  if constexpr (sizeof(T) == 4) return value;
  if constexpr (std::is_same_v<T, Float16>) return float16_rounded(value);
#if defined(__AVX512BF16__)
  __m512i halves;
  if (convert(value, &halves)) return {{upper_halves<0>(halves, all_halves), upper_halves<16>(halves, all_halves)}};
#endif
  return each_part([&](int i) { return (Floats)(bfloat16_words(value.part[i]) & 0xFFFF0000u); });
}

DSA_RT_INLINE void store(float* p, const Lanes& value, Whole) {
#pragma GCC unroll 8
  for (int i = 0; i < Lanes::parts; ++i) memcpy(p + i * vector_floats, &value.part[i], sizeof(Floats));
}
// Values that are as an element holds them already.
DSA_RT_INLINE void store_rounded(float* p, const Lanes& value, Whole) { store(p, value, Whole{}); }
DSA_RT_INLINE void store_rounded(BFloat16* p, const Lanes& value, Whole) {
#if defined(__AVX512F__)
  _mm512_storeu_si512(p, pack_upper_halves((Words)value.part[0], (Words)value.part[1], all_halves));
#else
#pragma GCC unroll 8
  for (int i = 0; i < Lanes::parts; ++i) {
    const Halves halves = narrow((Words)value.part[i] >> 16);
    memcpy(p + i * vector_floats, &halves, sizeof halves);
  }
#endif
}
DSA_RT_INLINE void store(BFloat16* p, const Lanes& value, Whole) {
#if defined(__AVX512BF16__)
  __m512i halves;
  if (convert(value, &halves)) return _mm512_storeu_si512(p, halves);
#endif
  store_rounded(p, each_part([&](int i) { return (Floats)bfloat16_words(value.part[i]); }), Whole{});
}
DSA_RT_FLOAT16 void store(Float16* p, const Lanes& value, Whole) {
#pragma GCC unroll 8
  for (int i = 0; i < Lanes::parts; ++i) {
    const Halves halves = float16_halves(value.part[i]);
    memcpy(p + i * vector_floats, &halves, sizeof halves);
  }
}
DSA_RT_INLINE void store_rounded(Float16* p, const Lanes& value, Whole) { store(p, value, Whole{}); }
// Past the caches, into aligned memory: it is not read first, and nothing has to leave the caches for it. Other threads
// see it after streams_end().
inline bool is_aligned(const void* p) { return (uintptr_t)p % 64 == 0; }
inline void streams_end() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}
DSA_RT_INLINE void stream(float* p, const Lanes& value, Whole) {
#if defined(__AVX2__)
#pragma GCC unroll 4
  for (int i = 0; i < Lanes::parts; ++i) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p + i * vector_floats, (__m512)value.part[i]);
#else
    _mm256_stream_ps(p + i * vector_floats, (__m256)value.part[i]);
#endif
  }
#else
  store(p, value, Whole{});
#endif
}
DSA_RT_INLINE void stream(BFloat16* p, const Lanes& value, Whole) {
#if defined(__AVX512F__)
  __m512i halves;
#if defined(__AVX512BF16__)
  if (convert(value, &halves)) return _mm512_stream_si512((__m512i*)p, halves);
#endif
  store(reinterpret_cast<BFloat16*>(&halves), value, Whole{});
  _mm512_stream_si512((__m512i*)p, halves);
#elif defined(__AVX2__)
  __m256i halves[2];
  store(reinterpret_cast<BFloat16*>(halves), value, Whole{});
  _mm256_stream_si256((__m256i*)p, halves[0]);
  _mm256_stream_si256((__m256i*)p + 1, halves[1]);
#else
  store(p, value, Whole{});
#endif
}
DSA_RT_INLINE void stream(Float16* p, const Lanes& value, Whole) {
#if defined(__AVX512F__)
  const __m512i low = _mm512_castsi256_si512((__m256i)float16_halves(value.part[0]));
  _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(low, (__m256i)float16_halves(value.part[1]), 1));
#elif defined(__F16C__)
#pragma GCC unroll 2
  for (int i = 0; i < Lanes::parts; i += 2) {
    const __m128i low = (__m128i)float16_halves(value.part[i]), high = (__m128i)float16_halves(value.part[i + 1]);
    _mm256_stream_si256((__m256i*)p + i / 2, _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1));
  }
#else
  store(p, value, Whole{});
#endif
}

template <class T>
inline void store(T* p, const Lanes& value, Some block) {
  float values[Lanes::count];
  store(values, value, Whole{});
  for (int64_t l = 0; l < block.count; ++l) store(p + l, values[l]);
}

template <class T>
inline void stream(T* p, const Lanes& value, Some block) {
  store(p, value, block);
}

inline void store_rounded(float* p, const Lanes& value, Some block) { store(p, value, block); }
inline void store_rounded(BFloat16* p, const Lanes& value, Some block) {
  BFloat16 values[Lanes::count];
  store_rounded(values, value, Whole{});
  for (int64_t l = 0; l < block.count; ++l) p[l] = values[l];
}
inline void store_rounded(Float16* p, const Lanes& value, Some block) { store(p, value, block); }

// Elements as they are, with the bits of their NaNs.
template <class T>
DSA_RT_INLINE void copy(T* to, const T* from, Whole) {
  constexpr int vectors = Lanes::count * sizeof(T) / vector_bytes;
#pragma GCC unroll 8
  for (int i = 0; i < vectors; ++i) {
    Floats bits;
    memcpy(&bits, (const char*)from + i * vector_bytes, sizeof bits);
    memcpy((char*)to + i * vector_bytes, &bits, sizeof bits);
  }
}
template <class T>
inline void copy(T* to, const T* from, Some block) {
  for (int64_t l = 0; l < block.count; ++l) to[l] = from[l];
}

// Asks for the memory of elements that will be read soon; it need not be there.
template <int count = Lanes::count, class T>
DSA_RT_INLINE void fetch(const T* p) {
  for (size_t byte = 0; byte < count * sizeof(T); byte += 64) __builtin_prefetch((const char*)p + byte);
}

// Calls body(first element, Whole or Some) for the blocks of a row.
template <class Body>
DSA_RT_INLINE void for_blocks(int64_t width, Body body) {
  int64_t i = 0;
  for (; i + Lanes::count <= width; i += Lanes::count) body(i, Whole{});
  if (i < width) body(i, Some{width - i});
}

}  // namespace
}  // namespace dsa_rt::cpu
