// AVX2: eight fp32 lanes.
#include "step_impl.h"

const dsa_rt::cpu::StepKernels dsa_rt::cpu::step_avx2 = dsa_rt::cpu::kernels;
