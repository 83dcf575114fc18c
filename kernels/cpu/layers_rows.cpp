// gather_rows and scatter_rows: copies, in which instruction sets make no difference.
#include "layers.h"
#include "move_row.h"

namespace dsa_rt::cpu {

void move_rows(const MoveRowsParams& p, bool scatter, int64_t begin, int64_t end) {
  const bool fetches = p.batch * p.active * p.row_bytes > 1 << 19;  // beyond L2
  for (int64_t i = begin; i < end;) {
    const int64_t batch = i / p.active, first = i % p.active;
    const int64_t last = end - i < p.active - first ? first + end - i : p.active;  // of this batch
    char* out = static_cast<char*>(p.out) + batch * p.out_batch_stride;
    const char* in = static_cast<const char*>(p.from) + batch * p.from_batch_stride;
    const auto from = [&](int64_t token) { return in + (scatter ? token : p.rows[token]) * p.from_row_stride; };
    for (int64_t token = first; token < last; ++token)
      move_row(out + (scatter ? p.rows[token] : token) * p.out_row_stride, from(token),
               fetches && token + 1 < last ? from(token + 1) : nullptr, p.row_bytes, p.streams);
    i += last - first;
  }
  if (p.streams) moves_end();
}

}  // namespace dsa_rt::cpu
