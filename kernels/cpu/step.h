// The step family on the CPU: a table of kernels for each instruction set.
#pragma once

#include "../step.h"

namespace dsa_rt::cpu {

// Each kernel works on the flattened rows [begin, end) of batch·rows. Rows are independent of each other and computed
// in one fixed order, so that no split over threads changes a bit.
struct StepKernels {
  void (*philox_normal)(const PhiloxNormalParams&, int64_t begin, int64_t end);
  void (*renoise)(const RenoiseParams&, int64_t begin, int64_t end);
  void (*cached_step)(const CachedStepParams&, int64_t begin, int64_t end);
};

extern const StepKernels step_generic;
#if defined(DSA_RT_X86)
extern const StepKernels step_avx2;
extern const StepKernels step_avx512;
#if defined(DSA_RT_AVX512_BF16)
extern const StepKernels step_avx512_bf16;
#endif
#endif

void exit_decision(const ExitDecisionParams&);

}  // namespace dsa_rt::cpu
