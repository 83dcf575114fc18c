// The baseline instruction set of the compiler's target.
#include "layers_impl.h"

const dsa_rt::cpu::LayerKernels dsa_rt::cpu::layers_generic = dsa_rt::cpu::layer_kernels;
