// linear, written once over a vector type V (attention_float32.h says what that is): a translation unit defines V for
// its instruction set and type of weights and exports linear_kernel<V>.
//
// 2·M·N·K operations for M rows; bytes: the weights, x and out once each. Arithmetic bounds it from some dozens of rows
// on, the bandwidth of the weights below. docs/kernels/linear.md has the floor and what is reached.
//
// A tile of rows × columns goes along K in blocks. Of each, six rows at a time stay in L1 while the tile's panels of
// weights come by from L2, six rows × one panel of sums in registers. Between blocks of K sums lie in scratch, in fp32,
// so that an element is one sum over K from its first term to its last however K is cut. After the last block a row
// gets bias, activation and its one rounding.
#pragma once

#include <math.h>

#include <type_traits>

#include "elements.h"
#include "linear.h"
#include "multiply.h"
#include "rows.h"

namespace dsa_rt::cpu {
namespace {

constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// W: type of the weights. Element: that of rows of x as V::repeat reads them.
template <class Base, class W>
struct FmaOperands : Base {
  using Vec = typename Base::Vec;
  using Weight = W;
  using Element = float;
  using Unit = float;
  using Panel = W;  // what a unit of a panel is stored as
  using Units = Vec;
  static constexpr int group = 1;

  static Units units(const W* p) { return (Vec)load_vector(p); }
  static Units repeat(const float* p) { return Base::all(*p); }
  static Vec multiply_add(Vec total, Units a, Units b) { return Base::multiply_add_floats(a, b, total); }
};

// Sizes for a call, and the pieces of a thread's scratch.
template <class V>
struct LinearWork {
  static constexpr int64_t panel = V::columns * V::lanes;
  int64_t blocks, steps, block_steps;  // along K: blocks of block_steps, the last one shorter
  typename V::Element* x;              // [tile.rows][block_steps units]
  float* sums;                         // [tile.rows][tile.columns]
  size_t bytes;

  LinearWork(const LinearParams& p, LinearTile tile, void* scratch) {
    steps = (p.k + V::group - 1) / V::group;
    blocks = steps > linear_most_steps ? (steps + linear_most_steps - 1) / linear_most_steps : 1;
    block_steps = (steps + blocks - 1) / blocks;
    const int64_t x_bytes = (tile.rows * block_steps * 4 + 63) / 64 * 64;
    x = static_cast<typename V::Element*>(scratch);
    sums = reinterpret_cast<float*>(static_cast<char*>(scratch) + x_bytes);
    bytes = static_cast<size_t>(x_bytes + tile.rows * tile.columns * 4);
  }
};

// x / (1 + 2^-t), t of the sign of x: of the two forms of the sigmoid the one whose power is not above 1.
template <class V>
DSA_RT_INLINE typename V::Vec gated(typename V::Vec x, typename V::Vec t) {
  const auto zero = V::all(0.0f);
  const auto power = V::exp2(-V::max(t, -t));
  return (V::max(x, zero) - V::max(-x, zero) * power) / (V::all(1.0f) + power);
}

// GELU in its tanh form, x / (1 + e^-2u) with u = √(2/π)·(x + 0.044715·x³). -inf becomes NaN, as defined.
template <class V>
DSA_RT_INLINE typename V::Vec gelu(typename V::Vec x) {
  return gated<V>(x, x * V::multiply_add_floats(V::all(0.10294324f), x * x, V::all(2.3022082f)));  // 2u·log2(e)
}

template <class V>
DSA_RT_INLINE typename V::Vec silu(typename V::Vec x) {
  return gated<V>(x, x * V::all(1.4426950f));  // log2(e)
}

// GELU with the error function: max(x, 0) - |x|/2·erfc(|x|/√2), erfc by Abramowitz and Stegun 7.1.26 to 1.5e-7. What is
// beyond 30 has a tail of 0.
template <class V>
DSA_RT_INLINE typename V::Vec gelu_erf(typename V::Vec x) {
  const auto one = V::all(1.0f), size = -V::max(V::all(-30.0f), -V::max(x, -x));
  const auto t = one / V::multiply_add_floats(size, V::all(0.23164190f), one);
  auto sum = V::all(1.061405429f);
  for (const float term : {-1.453152027f, 1.421413741f, -0.284496736f, 0.254829592f})
    sum = V::multiply_add_floats(sum, t, V::all(term));
  const auto power = V::exp2(size * size * V::all(-0.72134752f));  // e^(-x²/2)
  return V::max(V::all(0.0f), x) - V::all(0.5f) * size * sum * t * power;  // NaN stays: it is the second of max
}

template <class V>
DSA_RT_INLINE typename V::Vec activate(Activation activation, typename V::Vec x) {
  switch (activation) {
    case Activation::gelu: return gelu<V>(x);
    case Activation::gelu_erf: return gelu_erf<V>(x);
    case Activation::silu: return silu<V>(x);
    default: return x;
  }
}

// `count` columns of a row of out from their sums.
template <class V, class T>
DSA_RT_INLINE void finish(const LinearParams& p, T* out, const float* sums, const float* bias, int64_t count) {
  for_blocks(count, [&](int64_t i, auto block) {
    Lanes value = load(sums + i, block);
    if (bias) value = value + load(bias + i, block);
    if (p.activation != Activation::none)
      value = each_part([&](int j) { return (Floats)activate<V>(p.activation, (typename V::Vec)value.part[j]); });
    store(out + i, value, block);
  });
}

// Whether the sums of a panel are whole Lanes, which is how a row is finished.
template <class V>
constexpr bool goes_straight = V::columns * V::lanes % Lanes::count == 0;

// A whole panel of a row of out from its sums, which are in registers; no activation.
template <class V, class T, int columns>
DSA_RT_INLINE void finish_panel(T* out, const float* bias, const typename V::Vec (&sums)[columns]) {
  constexpr int together = Lanes::count / V::lanes;
#pragma GCC unroll 4
  for (int c = 0; c < columns; c += together) {
    Lanes value = each_part([&](int i) { return (Floats)sums[c + i]; });
    if (bias) value = value + load(bias + c * V::lanes, Whole{});
    store(out + c * V::lanes, value, Whole{});
  }
}

// sums[row][column] (+)= x·W for up to block_rows rows and one panel, over `steps` steps. With `out`, rows from the panel's
// first column on, the sums of a whole panel go straight there.
template <class V, class T, int rows = block_rows, int columns = V::columns>
void add_block(float* sums, int64_t sum_step, const typename V::Element* x, int64_t x_step,
               const typename V::Panel* panel, int64_t steps, bool add, int64_t wanted_rows, int64_t wanted_columns,
               T* const* out, const float* bias) {
  if constexpr (rows > 1)
    if (wanted_rows < rows)
      return add_block<V, T, rows - 1, columns>(sums, sum_step, x, x_step, panel, steps, add, wanted_rows,
                                                wanted_columns, out, bias);
  if constexpr (columns > 1)
    if (wanted_columns < columns)
      return add_block<V, T, rows, columns - 1>(sums, sum_step, x, x_step, panel, steps, add, wanted_rows,
                                                wanted_columns, nullptr, nullptr);
  typename V::Vec total[rows][columns] = {};
  if (add)
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) total[r][c] = V::load(sums + r * sum_step + c * V::lanes);
  multiply<V>(total, x, x_step, panel, steps);
  if constexpr (goes_straight<V> && columns == V::columns)
    if (out) {
#pragma GCC unroll 8
      for (int r = 0; r < rows; ++r) finish_panel<V>(out[r], bias, total[r]);
      return;
    }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) V::store(sums + r * sum_step + c * V::lanes, total[r][c]);
}

// `count` elements of a row of x from `first` on, rounded to the type of the weights, in whole units.
template <class V, class T>
void pack_row(typename V::Element* to, const T* x, int64_t count) {
  for_blocks(count, [&](int64_t i, auto block) {
    store(to + i, rounded<typename V::Weight>(load(x + i, block)), block);
  });
  for (int64_t i = count; i % V::group; ++i) store(to + i, 0.0f);
}

// Calls body(an element of that type): rows of x and out are in fp32 or in the type of the weights.
template <class W, class Body>
void with_row_type(Element element, Body body) {
  if constexpr (!std::is_same_v<W, float>)
    if (element != Element::float32) return body(W{});
  body(float{});
}

// Rows [first_row, first_row + rows) of batch·active, columns [first_column, first_column + columns).
template <class V, class X, class T>
void run_tile(const LinearParams& p, const LinearWork<V>& w, int64_t first_row, int64_t rows, int64_t first_column,
              int64_t columns) {
  using Element = typename V::Element;
  const auto x_row = [&](int64_t r) {
    return row_of<const X>(p.x, (first_row + r) / p.active, (first_row + r) % p.active);
  };
  // Rows that are as the kernel reads them stay where they are.
  bool in_place = std::is_same_v<X, Element> && std::is_same_v<X, typename V::Weight> && p.k % V::group == 0;
  in_place = in_place && (p.batch == 1 || p.x.batch_stride == p.active * p.x.row_stride);
  const int64_t padded = (columns + V::lanes - 1) / V::lanes * V::lanes, sum_step = padded;
  const int64_t straight = goes_straight<V> && p.activation == Activation::none ? columns / w.panel * w.panel : 0;
  const auto* panels = static_cast<const typename V::Panel*>(p.weight) + first_column * w.steps;
  const float* bias = p.bias ? p.bias + first_column : nullptr;
  for (int64_t b = 0; b < w.blocks; ++b) {
    const int64_t first = b * w.block_steps, steps = least(w.block_steps, w.steps - first);
    const bool last = b + 1 == w.blocks;
    const Element* x = w.x;
    int64_t x_step = w.block_steps * V::group;
    if (in_place) {
      x = reinterpret_cast<const Element*>(x_row(0)) + first * V::group;
      x_step = p.x.row_stride;
    } else {
      const int64_t from = first * V::group, count = least(steps * V::group, p.k - from);
      for (int64_t r = 0; r < rows; ++r) pack_row<V>(w.x + r * x_step, x_row(r) + from, count);
    }
    for (int64_t r = 0; r < rows; r += block_rows) {
      const int64_t some = least(block_rows, rows - r);
      float* sums = w.blocks > 1 ? w.sums + r * sum_step : w.sums;
      T* out[block_rows];
      for (int64_t i = 0; i < some; ++i) {
        const int64_t row = first_row + r + i;
        out[i] = row_of<T>(p.out, row / p.active, row % p.active) + first_column;
      }
      for (int64_t c = 0; c < padded; c += w.panel) {
        const int64_t width = least(w.panel, padded - c);
        T* panel_out[block_rows];
        for (int64_t i = 0; i < some; ++i) panel_out[i] = out[i] + c;
        add_block<V, T>(sums + c, sum_step, x + r * x_step, x_step, panels + c * w.steps + first * width, steps, b > 0,
                        some, width / V::lanes, last && c < straight ? panel_out : nullptr, bias ? bias + c : nullptr);
      }
      if (last && straight < columns)
        for (int64_t i = 0; i < some; ++i)
          finish<V>(p, out[i] + straight, sums + i * sum_step + straight, bias ? bias + straight : nullptr,
                    columns - straight);
    }
  }
}

template <class V>
void run_tiles(const LinearParams& p, LinearTile tile, void* scratch, int64_t begin, int64_t end) {
  const LinearWork<V> work(p, tile, scratch);
  const int64_t all_rows = p.batch * p.active, row_tiles = (all_rows + tile.rows - 1) / tile.rows;
  with_row_type<typename V::Weight>(p.x.element, [&](auto type) {
    with_row_type<typename V::Weight>(p.out.element, [&](auto out_type) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t row = i % row_tiles * tile.rows, column = i / row_tiles * tile.columns;
        run_tile<V, decltype(type), decltype(out_type)>(p, work, row, least(tile.rows, all_rows - row), column,
                                                        least(tile.columns, p.n - column));
      }
    });
  });
}

template <class V>
size_t linear_scratch(const LinearParams& p, LinearTile tile) {
  return LinearWork<V>(p, tile, nullptr).bytes;
}

template <class V>
constexpr LinearKernel linear_kernel(const char* name) {
  return {{name, V::columns * V::lanes, V::lanes, V::group}, linear_scratch<V>, run_tiles<V>};
}

}  // namespace
}  // namespace dsa_rt::cpu
