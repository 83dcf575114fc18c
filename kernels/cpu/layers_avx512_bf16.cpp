// AVX-512 with conversion to bf16 by one instruction: the same bits as without.
#include "layers_impl.h"

const dsa_rt::cpu::LayerKernels dsa_rt::cpu::layers_avx512_bf16 = dsa_rt::cpu::layer_kernels;
