// AVX-512 with conversion to bf16 by one instruction: the same bits as without.
#include "step_impl.h"

const dsa_rt::cpu::StepKernels dsa_rt::cpu::step_avx512_bf16 = dsa_rt::cpu::kernels;
