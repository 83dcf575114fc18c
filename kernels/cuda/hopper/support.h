// What the Hopper kernel takes, as far as the arguments say it.
#pragma once

#include <stdint.h>

#include <string>

#include "plan.h"

namespace dsa_rt::cuda::hopper {

// TMA moves 16-byte pieces, so many elements: addresses and strides are multiples of 16 bytes, strides below 2^40
// bytes. A stride counts only where its dimension has a second element.
inline std::string heads_refusal(const std::string& name, const Heads& x, int64_t batch, int64_t rows, int64_t heads,
                                 int piece = 8) {
  if ((uintptr_t)x.data % 16) return name + "'s address is no multiple of 16 bytes";
  const struct {
    const char* of;
    int64_t size, stride;
  } dimensions[] = {{"batch", batch, x.batch_stride}, {"row", rows, x.row_stride}, {"head", heads, x.head_stride}};
  for (const auto& d : dimensions)
    if (d.size > 1 && (d.stride % piece || d.stride <= 0 || d.stride >= (int64_t)1 << 39))
      return name + "'s " + d.of + " stride is " + std::to_string(d.stride) +
             " elements, expected a positive multiple of " + std::to_string(piece) + " below 2^39";
  return "";
}

// Why the kernel does not take the arguments, as a clause; empty where it does.
inline std::string hopper_refusal(const AttentionParams& a) {
  constexpr int64_t most = INT32_MAX;
  if (a.element == Element::float32) return "the elements are float32, the kernel is for bfloat16 and float16";
  if (a.dim != 64 && a.dim != 128) return "the head dimension is " + std::to_string(a.dim) + ", expected 64 or 128";
  if (a.segments && a.segment_count > max_segments)
    return "there are " + std::to_string(a.segment_count) + " segments, expected at most " +
           std::to_string(max_segments);
  if (a.active > most || a.rows > most || a.batch > most || a.heads > most) return "a dimension exceeds 2^31 - 1";
  for (const auto& refusal : {heads_refusal("out", a.out, a.batch, a.active, a.heads),
                              heads_refusal("q", a.q, a.batch, a.active, a.heads),
                              heads_refusal("k", a.k, a.batch, a.rows, a.heads),
                              heads_refusal("v", a.v, a.batch, a.rows, a.heads)})
    if (!refusal.empty()) return refusal;
  if (make_plan(a).tiles == INT32_MAX) return "there are 2^31 - 1 tiles of 128 queries or more";
  return "";
}

}  // namespace dsa_rt::cuda::hopper
