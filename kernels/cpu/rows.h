// Rows of tensors whose element type is known at run time. Internal linkage: see philox.h.
#pragma once

#include "../step.h"
#include "bfloat16.h"
#include "float16.h"

namespace dsa_rt::cpu {
namespace {

template <class T>
T* row_of(const Rows& rows, int64_t batch, int64_t row) {
  return static_cast<T*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride;
}

// Row `index` of batch·active.
template <class T>
T* flat_row(const Rows& rows, int64_t active, int64_t index) {
  return row_of<T>(rows, index / active, index % active);
}

// Calls body(an element of that type).
template <class Body>
void with_type(Element element, Body body) {
  switch (element) {
    case Element::float32: return body(float{});
    case Element::bfloat16: return body(BFloat16{});
    case Element::float16: return body(Float16{});
  }
}

}  // namespace
}  // namespace dsa_rt::cpu
