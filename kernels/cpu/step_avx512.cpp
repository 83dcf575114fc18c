// AVX-512 F, BW, DQ and VL: sixteen fp32 lanes.
#include "step_impl.h"

const dsa_rt::cpu::StepKernels dsa_rt::cpu::step_avx512 = dsa_rt::cpu::kernels;
