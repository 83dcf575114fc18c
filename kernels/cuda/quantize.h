// quantize_rows on CUDA: the launcher. `stream` is a cudaStream_t as an integer; the caller has made the tensors' device
// current. Nothing is allocated, nothing waits and it can be captured into a graph; a launch that fails throws
// std::runtime_error. A batch is at most 65535, rows times heads at most 2^32 - 1; more throws.
#pragma once

#include "../quantize.h"

namespace dsa_rt::cuda {

constexpr int64_t max_quantized = 1 << 30;  // elements of a head; more throws

void quantize_rows(const QuantizeRowsParams&, uintptr_t stream);

}  // namespace dsa_rt::cuda
