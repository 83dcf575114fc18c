// Four fp32 lanes of the baseline instruction set, through the compiler's vector types.
#pragma once

#include <math.h>

#include "attention_float32.h"

namespace dsa_rt::cpu {
namespace {

struct Generic {
  typedef float Vec __attribute__((vector_size(16)));
  static constexpr int lanes = 4, columns = 2;

  static Vec load(const float* p) {
    Vec v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Vec v) { memcpy(p, &v, sizeof v); }
  static Vec all(float value) { return Vec{value, value, value, value}; }
  static Vec multiply_add_floats(Vec a, Vec b, Vec c) { return a * b + c; }
  static Vec max(Vec a, Vec b) {
    for (int i = 0; i < lanes; ++i) a[i] = a[i] > b[i] ? a[i] : b[i];
    return a;
  }
  static float largest(Vec v) {
    float most = v[0];
    for (int i = 1; i < lanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
  }
  static Vec finite_or_zero(Vec v) {
    for (int i = 0; i < lanes; ++i) v[i] = v[i] == -INFINITY ? 0.0f : v[i];
    return v;
  }
  static Vec exp2(Vec t) {
    Vec clamped = t;
    for (int i = 0; i < lanes; ++i) clamped[i] = t[i] < -126.0f ? -126.0f : t[i];
    const Vec magic = all(12582912.0f);  // 1.5·2^23: a sum with it is rounded to whole numbers, which are its low bits
    const Vec shifted = clamped + magic;
    Vec value = exp2_polynomial<Generic>(clamped - (shifted - magic));
    for (int i = 0; i < lanes; ++i)
      value[i] = t[i] < -126.0f ? 0.0f : value[i] * bits_to_float((float_to_bits(shifted[i]) + 127u) << 23);
    return value;
  }

  template <class T>
  static Vec four(const T* p) {
    return Vec{cpu::load(p), cpu::load(p + 1), cpu::load(p + 2), cpu::load(p + 3)};
  }
  static Vec four(const Float8* p) {
    typedef uint32_t Words __attribute__((vector_size(16)));
    return (Vec)Words{p[0].bits, p[1].bits, p[2].bits, p[3].bits};
  }
  template <class Part, class Put>
  static void transpose(Part part, Put put) {
    const Vec a = part(0), b = part(1), c = part(2), d = part(3);
    for (int i = 0; i < 4; ++i) put(i, Vec{a[i], b[i], c[i], d[i]});
  }
};

}  // namespace
}  // namespace dsa_rt::cpu
