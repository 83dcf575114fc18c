// Thirty-two fp32 numbers in the widest vectors of a translation unit's instruction set, through the compiler's vector
// types. Every operation but multiply_add is rounded by itself and sums have one order, so that kernels written over Lanes
// without it have the same bits on every instruction set. Internal linkage: see philox.h.
#pragma once

#include <utility>

#include "../bits.h"

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
