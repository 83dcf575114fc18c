// AVX-512 without bf16 dot products: fp32 operands.
#include "attention_impl.h"
#include "vectors_avx512.h"

namespace dsa_rt::cpu {

const AttentionKernels attention_avx512 = {attention_kernel<Float32Operands<Avx512>, float>,
                                           attention_kernel<Float32Operands<Avx512>, BFloat16>,
                                           attention_kernel<Float32Operands<Avx512>, Float16>,
                                           attention_kernel<Float32Operands<Avx512>, float, Float8>,
                                           attention_kernel<Float32Operands<Avx512>, BFloat16, Float8>,
                                           attention_kernel<Float32Operands<Avx512>, Float16, Float8>};

}  // namespace dsa_rt::cpu
