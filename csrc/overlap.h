// Whether tensors share memory, and their elements with each other.
#pragma once

#include "tensor.h"

namespace dsa_rt {

bool empty(const TensorView& view);
bool share_memory(const TensorView& a, const TensorView& b);
bool elements_share_memory(const TensorView& view);
bool same_view(const TensorView& a, const TensorView& b);  // the very same elements in the same places

}  // namespace dsa_rt
