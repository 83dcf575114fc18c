// The vector types of attention_impl.h, for operands of one fp32 each; bf16, fp16 and E4M3 elements are widened as they
// are packed.
//
// A vector type V has: Vec, `lanes` fp32 numbers with + - *; Unit, 4 bytes of a packed operand that hold `group`
// elements along the sum of a product, and Units, `lanes` of them; `columns`, the vectors of a panel. Functions: load,
// store, all; units, repeat (load a vector of units, or one unit for all lanes); multiply_add(total, units, units);
// multiply_add_floats(a, b, c) = a·b + c; max, largest (over lanes); finite_or_zero (0 for -inf); exp2; store_weights;
// pack_rows, pack_keys, pack_values. For packing, an instruction set has four (load four numbers, or E4M3 codes into
// their lanes) and transpose, where part(j) is four units of key j and put(c, v) gets unit c of `lanes` keys.
#pragma once

#include "bfloat16.h"
#include "float16.h"
#include "float8.h"

namespace dsa_rt::cpu {
namespace {

// 2^f for f in ±1/2: a minimax polynomial (Lawson) of relative error 9.2e-8, exactly 1 at 0. In fp32 it is within 2.1
// units in the last place.
template <class V>
DSA_RT_INLINE typename V::Vec exp2_polynomial(typename V::Vec f) {
  auto p = V::multiply_add_floats(V::all(0.0013264727f), f, V::all(0.009671513f));
  p = V::multiply_add_floats(p, f, V::all(0.055507336f));
  p = V::multiply_add_floats(p, f, V::all(0.24022242f));
  p = V::multiply_add_floats(p, f, V::all(0.693147f));
  return V::multiply_add_floats(p, f, V::all(1.0f));
}

template <class Base>
struct Float32Operands : Base {
  using Vec = typename Base::Vec;
  using Unit = float;
  using Units = Vec;
  static constexpr int group = 1;
  static constexpr int width = Base::columns * Base::lanes;

  static Units units(const float* p) { return Base::load(p); }
  static Units repeat(const float* p) { return Base::all(*p); }
  static Vec multiply_add(Vec total, Units a, Units b) { return Base::multiply_add_floats(a, b, total); }
  static void store_weights(float* to, Vec a, Vec b) {
    Base::store(to, a);
    Base::store(to + Base::lanes, b);
  }

  template <class T>
  static void pack_rows(float* to, const T* rows, int64_t stride, int64_t count, int64_t dim) {
    for (int64_t r = 0; r < count; ++r) load_row(to + r * dim, rows + r * stride, dim);
  }

  // A panel [dim][width]; after `count` keys the last one is repeated.
  template <class T>
  static void pack_keys(float* to, const T* rows, int64_t stride, int64_t count, int64_t dim) {
    for (int64_t i = 0; i < width; i += Base::lanes) {
      const T* key[Base::lanes];
      for (int64_t j = 0; j < Base::lanes; ++j) key[j] = rows + (i + j < count ? i + j : count - 1) * stride;
      for (int64_t d = 0; d < dim; d += 4)
        if (const int64_t left = dim - d; left >= 4)
          Base::transpose([&](int j) { return Base::four(key[j] + d); },
                          [&](int c, Vec v) { Base::store(to + (d + c) * width + i, numbers<T>(v)); });
        else
          for (int64_t c = d; c < dim; ++c)
            for (int64_t j = 0; j < Base::lanes; ++j) to[c * width + i + j] = load_element(key[j] + c);
    }
  }

  // A panel [keys][channels], zeros from channel `dim` on.
  template <class T>
  static void pack_values(float* to, const T* rows, int64_t stride, int64_t keys, int64_t channels, int64_t dim) {
    const int64_t real = dim < channels ? dim : channels;
    for (int64_t i = 0; i < keys; ++i) {
      load_row(to + i * channels, rows + i * stride, real);
      for (int64_t d = real; d < channels; ++d) to[i * channels + d] = 0.0f;
    }
  }

 private:
  // What `four` loaded.
  template <class T>
  static Vec numbers(Vec loaded) {
    return sizeof(T) == 1 ? float8_numbers(loaded) : loaded;
  }
  template <class T>
  static float load_element(const T* p) {
    return cpu::load(p);
  }
};

}  // namespace
}  // namespace dsa_rt::cpu
