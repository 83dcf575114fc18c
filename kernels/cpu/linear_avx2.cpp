// AVX2 and FMA; bf16 and fp16 weights are widened as they are read.
#include "linear_impl.h"
#include "vectors_avx2.h"

namespace dsa_rt::cpu {

const LinearKernels linear_avx2 = {linear_kernel<FmaOperands<Avx2, float>>("avx2"),
                                 linear_kernel<FmaOperands<Avx2, BFloat16>>("avx2"),
                                 linear_kernel<FmaOperands<Avx2, Float16>>("avx2")};

}  // namespace dsa_rt::cpu
