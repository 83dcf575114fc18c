// AVX2 and FMA: eight fp32 lanes.
#include "attention_impl.h"
#include "vectors_avx2.h"

namespace dsa_rt::cpu {

const AttentionKernels attention_avx2 = {attention_kernel<Float32Operands<Avx2>, float>,
                                         attention_kernel<Float32Operands<Avx2>, BFloat16>,
                                         attention_kernel<Float32Operands<Avx2>, Float16>,
                                         attention_kernel<Float32Operands<Avx2>, float, Float8>,
                                         attention_kernel<Float32Operands<Avx2>, BFloat16, Float8>,
                                         attention_kernel<Float32Operands<Avx2>, Float16, Float8>};

}  // namespace dsa_rt::cpu
