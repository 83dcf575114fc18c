// AVX-512 F, BW, DQ and VL: sixteen fp32 lanes.
#include "layers_impl.h"

const dsa_rt::cpu::LayerKernels dsa_rt::cpu::layers_avx512 = dsa_rt::cpu::layer_kernels;
