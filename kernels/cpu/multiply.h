// The inner loop of attention and linear: a block of rows times a panel of columns, all sums in registers.
#pragma once

#include <stdint.h>

#include "../bits.h"

namespace dsa_rt::cpu {
namespace {

constexpr int block_rows = 6;  // with V::columns vectors beside them they fill the register file

// total[r][c] += Σ_k left[r][k]·right[k][c]: rows of `left` lie row_step of its elements apart, a unit is one of them
// or several; `right` is a panel of `columns` vectors. A sum's terms come in the order of k, whatever rows and columns
// stand beside it.
template <class V, int rows, int columns, class Left, class Right>
DSA_RT_INLINE void multiply(typename V::Vec (&total)[rows][columns], const Left* left, int64_t row_step,
                            const Right* right, int64_t steps) {
  constexpr int64_t unit = sizeof(typename V::Unit) / sizeof(Left);
  for (int64_t k = 0; k < steps; ++k, left += unit, right += columns * V::lanes) {
    typename V::Units panel[columns];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) panel[c] = V::units(right + c * V::lanes);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const typename V::Units row = V::repeat(left + r * row_step);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) total[r][c] = V::multiply_add(total[r][c], row, panel[c]);
    }
  }
}

}  // namespace
}  // namespace dsa_rt::cpu
