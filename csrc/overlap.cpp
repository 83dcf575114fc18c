#include "overlap.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace dsa_rt {
namespace {

// Bytes [first, last) that hold elements, as runs without holes.
struct Run {
  intptr_t first, last;
  int owner;
};

void append_runs(const TensorView& view, int owner, std::vector<Run>& runs) {
  if (empty(view)) return;
  const int64_t bytes = view.itemsize;
  int64_t run = 1;
  int inner = view.dims;  // dimensions from here on are dense
  while (inner > 0 && (view.shape[inner - 1] == 1 || view.stride[inner - 1] == run)) run *= view.shape[--inner];
  std::array<int64_t, max_dims> index{};
  for (;;) {
    int64_t offset = 0;
    for (int d = 0; d < inner; ++d) offset += index[d] * view.stride[d];
    const auto first = reinterpret_cast<intptr_t>(view.data) + offset * bytes;
    runs.push_back({first, first + run * bytes, owner});
    int d = inner - 1;
    while (d >= 0 && ++index[d] == view.shape[d]) index[d--] = 0;
    if (d < 0) return;
  }
}

bool runs_overlap(std::vector<Run>& runs, bool different_owners) {
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.first < b.first; });
  intptr_t reached[2] = {INTPTR_MIN, INTPTR_MIN};
  for (const Run& run : runs) {
    if (run.first < reached[different_owners ? 1 - run.owner : run.owner]) return true;
    reached[run.owner] = std::max(reached[run.owner], run.last);
  }
  return false;
}

}  // namespace

bool empty(const TensorView& view) {
  return std::any_of(view.shape.begin(), view.shape.begin() + view.dims, [](int64_t size) { return size == 0; });
}

bool share_memory(const TensorView& a, const TensorView& b) {
  if (a.device.kind != b.device.kind || empty(a) || empty(b)) return false;
  const auto extent = [](const TensorView& view) {
    int64_t last = 0;
    for (int d = 0; d < view.dims; ++d) last += (view.shape[d] - 1) * view.stride[d];
    const auto first = reinterpret_cast<intptr_t>(view.data);
    return std::pair{first, first + (last + 1) * view.itemsize};
  };
  const auto [a_first, a_last] = extent(a);
  const auto [b_first, b_last] = extent(b);
  if (a_last <= b_first || b_last <= a_first) return false;
  std::vector<Run> runs;  // the extents meet, but rows of one may lie between rows of the other
  append_runs(a, 0, runs);
  append_runs(b, 1, runs);
  return runs_overlap(runs, true);
}

bool elements_share_memory(const TensorView& view) {
  std::vector<Run> runs;
  append_runs(view, 0, runs);
  return runs_overlap(runs, false);
}

bool same_view(const TensorView& a, const TensorView& b) {
  if (a.data != b.data || a.dtype != b.dtype || a.dims != b.dims) return false;
  for (int d = 0; d < a.dims; ++d)
    if (a.shape[d] != b.shape[d] || (a.shape[d] > 1 && a.stride[d] != b.stride[d])) return false;
  return true;
}

}  // namespace dsa_rt
