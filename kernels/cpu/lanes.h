// Thirty-two fp32 numbers in the widest vectors of a translation unit's instruction set, through the compiler's vector
// types. Every operation but multiply_add is rounded by itself and sums have one order, so that kernels written over Lanes
// without it have the same bits on every instruction set. Internal linkage: see philox.h.
#pragma once

#include <type_traits>
#include <utility>

#include "bfloat16.h"
#include "float16.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace dsa_rt::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
constexpr int vector_floats = vector_bytes / 4;

typedef float Floats __attribute__((vector_size(vector_bytes)));
typedef int32_t Ints __attribute__((vector_size(vector_bytes)));
typedef uint32_t Words __attribute__((vector_size(vector_bytes)));
typedef uint16_t Halves __attribute__((vector_size(vector_bytes / 2)));

// Halves to words and back; GCC 12 makes several instructions of __builtin_convertvector where there is one.
DSA_RT_INLINE Words widen(Halves halves) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu16_epi32((__m256i)halves);
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu16_epi32((__m128i)halves);
#else
  return __builtin_convertvector(halves, Words);
#endif
}
#if !defined(__AVX512F__)
DSA_RT_INLINE Halves narrow(Words words) {  // below 2^16
#if defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)words, (__m256i)words);
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#else
  return __builtin_convertvector(words, Halves);
#endif
}
#endif

struct Lanes {
  static constexpr int count = 32, parts = count / vector_floats;
  Floats part[parts];
};

// f(part number) for each part.
template <class F>
DSA_RT_INLINE Lanes each_part(F f) {
  Lanes made;
#pragma GCC unroll 8
  for (int i = 0; i < Lanes::parts; ++i) made.part[i] = f(i);
  return made;
}

DSA_RT_INLINE Floats all_of(float value) { return value - Floats{}; }  // -0 stays -0

DSA_RT_INLINE Lanes all(float value) {
  return each_part([=](int) { return all_of(value); });
}
DSA_RT_INLINE Lanes operator+(const Lanes& a, const Lanes& b) {
  return each_part([&](int i) { return a.part[i] + b.part[i]; });
}
DSA_RT_INLINE Lanes operator-(const Lanes& a, const Lanes& b) {
  return each_part([&](int i) { return a.part[i] - b.part[i]; });
}
DSA_RT_INLINE Lanes operator*(const Lanes& a, const Lanes& b) {
  return each_part([&](int i) { return a.part[i] * b.part[i]; });
}

// a·b + c, rounded once where the instruction set has that: the one operation whose bits depend on it.
DSA_RT_INLINE Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
DSA_RT_INLINE Lanes multiply_add(const Lanes& a, const Lanes& b, const Lanes& c) {
  return each_part([&](int i) { return multiply_add(a.part[i], b.part[i], c.part[i]); });
}

// The larger of two numbers, b where one is NaN.
DSA_RT_INLINE Lanes larger(const Lanes& a, const Lanes& b) {
  return each_part([&](int i) { return a.part[i] > b.part[i] ? a.part[i] : b.part[i]; });
}

DSA_RT_INLINE Lanes absolute(const Lanes& a) {
  return each_part([&](int i) { return (Floats)((Words)a.part[i] & 0x7FFFFFFFu); });
}

// Lanes `apart` from each other, a power of two, change places.
template <int apart, int... lane>
DSA_RT_INLINE Floats exchange(Floats a, std::integer_sequence<int, lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, a, (lane ^ apart)...);
#else
  return __builtin_shuffle(a, Ints{(lane ^ apart)...});
#endif
}
template <int apart>
DSA_RT_INLINE Floats exchange(Floats a) {
  return exchange<apart>(a, std::make_integer_sequence<int, vector_floats>{});
}
// Members of each pair (2i, 2i + 1) change places.
DSA_RT_INLINE Lanes swap_pairs(const Lanes& a) {
  return each_part([&](int i) { return exchange<1>(a.part[i]); });
}

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

// Halves are added, 16, 8, 4, 2 and 1 lanes apart.
DSA_RT_INLINE float sum(const Lanes& value) {
  Lanes s = value;
#pragma GCC unroll 4
  for (int apart = 16; apart >= vector_floats; apart /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < apart / vector_floats; ++i) s.part[i] = s.part[i] + s.part[i + apart / vector_floats];
  Floats left = s.part[0];
  if constexpr (vector_floats > 8) left = left + exchange<8>(left);
  if constexpr (vector_floats > 4) left = left + exchange<4>(left);
  left = left + exchange<2>(left);
  left = left + exchange<1>(left);
  return left[0];
}

// The largest of numbers that are not NaN.
inline float largest(const Lanes& value) {
  const auto of = [](Floats a, Floats b) { return a > b ? a : b; };
  Floats most = value.part[0];
#pragma GCC unroll 8
  for (int i = 1; i < Lanes::parts; ++i) most = of(most, value.part[i]);
  if constexpr (vector_floats > 8) most = of(most, exchange<8>(most));
  if constexpr (vector_floats > 4) most = of(most, exchange<4>(most));
  most = of(most, exchange<2>(most));
  most = of(most, exchange<1>(most));
  return most[0];
}

// 2^t for t <= 0, 0 below 2^-126, NaN for NaN; within 3 units in the last place.
DSA_RT_INLINE Lanes exp2(const Lanes& t) {
  return each_part([&](int i) {
    const Floats lowest = all_of(-126.0f), magic = all_of(12582912.0f);
    const Floats clamped = t.part[i] < lowest ? lowest : t.part[i];
    const Floats shifted = clamped + magic;  // rounded to whole numbers, which are the low bits of the sum
    const Floats f = clamped - (shifted - magic);
    // Minimax (Lawson) over ±1/2 of relative error 9.2e-8, exactly 1 at 0.
    Floats p = all_of(0.0013264727f) * f + 0.009671513f;
    p = p * f + 0.055507336f;
    p = p * f + 0.24022242f;
    p = p * f + 0.693147f;
    p = p * f + 1.0f;
    const Floats power = (Floats)(((Words)shifted + 127u) << 23);
    return t.part[i] < lowest ? Floats{} : p * power;
  });
}

}  // namespace
}  // namespace dsa_rt::cpu
