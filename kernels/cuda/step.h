// The step family on CUDA: launchers. `stream` is a cudaStream_t as an integer; the caller has made the tensors'
// device current. Nothing is allocated and nothing waits; a failed launch throws std::runtime_error.
#pragma once

#include "../step.h"

namespace dsa_rt::cuda {

void philox_normal(const PhiloxNormalParams&, uintptr_t stream);
void renoise(const RenoiseParams&, uintptr_t stream);
void cached_step(const CachedStepParams&, uintptr_t stream);
void exit_decision(const ExitDecisionParams&, uintptr_t stream);

}  // namespace dsa_rt::cuda
