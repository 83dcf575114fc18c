// The baseline instruction set of the compiler's target; bf16 and fp16 weights are widened as they are read.
#include "linear_impl.h"
#include "vectors_generic.h"

namespace dsa_rt::cpu {

const LinearKernels linear_generic = {linear_kernel<FmaOperands<Generic, float>>("generic"),
                                 linear_kernel<FmaOperands<Generic, BFloat16>>("generic"),
                                 linear_kernel<FmaOperands<Generic, Float16>>("generic")};

}  // namespace dsa_rt::cpu
