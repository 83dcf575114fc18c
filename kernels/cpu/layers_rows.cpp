// gather_rows and scatter_rows: copies, in which instruction sets make no difference.
#include "layers.h"
#include "move_row.h"

namespace dsa_rt::cpu {

void move_rows(const MoveRowsParams& p, bool scatter, int64_t begin, int64_t end) {
  const auto to = [&](int64_t i) {
    const int64_t token = i % p.active;
    return static_cast<char*>(p.out) + i / p.active * p.out_batch_stride + (scatter ? p.rows[token] : token) * p.out_row_stride;
  };
  const auto from = [&](int64_t i) {
    const int64_t token = i % p.active;
    return static_cast<const char*>(p.from) + i / p.active * p.from_batch_stride +
           (scatter ? token : p.rows[token]) * p.from_row_stride;
  };
  const bool fetches = p.batch * p.active * p.row_bytes > 1 << 19;  // beyond L2
  for (int64_t i = begin; i < end; ++i)
    move_row(to(i), from(i), fetches && i + 1 < end ? from(i + 1) : nullptr, p.row_bytes, p.streams);
  moves_end();
}

}  // namespace dsa_rt::cpu
