// AVX2: eight fp32 lanes.
#include "quantize_impl.h"

const dsa_rt::cpu::QuantizeRows dsa_rt::cpu::quantize_rows_avx2 = dsa_rt::cpu::quantize_rows;
