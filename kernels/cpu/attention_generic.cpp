// The baseline instruction set of the compiler's target: four fp32 lanes through the compiler's vector types.
#include "attention_impl.h"
#include "vectors_generic.h"

namespace dsa_rt::cpu {

const AttentionKernels attention_generic = {attention_kernel<Float32Operands<Generic>, float>,
                                            attention_kernel<Float32Operands<Generic>, BFloat16>,
                                            attention_kernel<Float32Operands<Generic>, Float16>,
                                            attention_kernel<Float32Operands<Generic>, float, Float8>,
                                            attention_kernel<Float32Operands<Generic>, BFloat16, Float8>,
                                            attention_kernel<Float32Operands<Generic>, Float16, Float8>};

}  // namespace dsa_rt::cpu
