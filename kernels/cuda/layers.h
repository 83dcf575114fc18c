// The memory-bound transformer ops on CUDA: launchers. `stream` is a cudaStream_t as an integer; the caller has made
// the tensors' device current. Nothing is allocated, nothing waits and all can be captured into a graph; a launch that
// fails throws std::runtime_error. A batch is at most 21845.
#pragma once

#include "../layers.h"

namespace dsa_rt::cuda {

constexpr int64_t max_row_width = 8192;  // C of the norms and qk_norm_rope_store; more throws
constexpr int64_t max_pool_heads = 128;   // H of confidence_pool; more throws

void norm_modulate(const NormModulateParams&, uintptr_t stream);  // with and without the residual
void rms_norm(const RmsNormParams&, uintptr_t stream);
void qk_norm_rope_store(const QkNormRopeStoreParams&, uintptr_t stream);
void move_rows(const MoveRowsParams&, bool scatter, uintptr_t stream);
void confidence_pool(const ConfidencePoolParams&, uintptr_t stream);

}  // namespace dsa_rt::cuda
