// gather_rows and scatter_rows: copies, in which instruction sets make no difference.
#include <string.h>

#include "layers.h"

namespace dsa_rt::cpu {

void move_rows(const MoveRowsParams& p, bool scatter, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t batch = i / p.active, token = i % p.active, row = p.rows[token];
    memcpy(static_cast<char*>(p.out) + batch * p.out_batch_stride + (scatter ? row : token) * p.out_row_stride,
           static_cast<const char*>(p.from) + batch * p.from_batch_stride + (scatter ? token : row) * p.from_row_stride,
           static_cast<size_t>(p.row_bytes));
  }
}

}  // namespace dsa_rt::cpu
