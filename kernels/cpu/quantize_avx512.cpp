// AVX-512 F, BW, DQ and VL: sixteen fp32 lanes. bf16 instructions have nothing to add.
#include "quantize_impl.h"

const dsa_rt::cpu::QuantizeRows dsa_rt::cpu::quantize_rows_avx512 = dsa_rt::cpu::quantize_rows;
