// AVX2: eight fp32 lanes.
#include "layers_impl.h"

const dsa_rt::cpu::LayerKernels dsa_rt::cpu::layers_avx2 = dsa_rt::cpu::layer_kernels;
