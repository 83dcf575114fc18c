// AVX-512 without bf16 dot products; bf16 and fp16 weights are widened as they are read.
#include "linear_impl.h"
#include "vectors_avx512.h"

namespace dsa_rt::cpu {

const LinearKernels linear_avx512 = {linear_kernel<FmaOperands<Avx512, float>>("avx512"),
                                 linear_kernel<FmaOperands<Avx512, BFloat16>>("avx512"),
                                 linear_kernel<FmaOperands<Avx512, Float16>>("avx512")};

}  // namespace dsa_rt::cpu
