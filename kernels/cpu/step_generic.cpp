// The baseline instruction set of the compiler's target.
#include "step_impl.h"

const dsa_rt::cpu::StepKernels dsa_rt::cpu::step_generic = dsa_rt::cpu::kernels;
