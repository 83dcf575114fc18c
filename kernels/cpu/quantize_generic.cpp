// The baseline instruction set of the compiler's target.
#include "quantize_impl.h"

const dsa_rt::cpu::QuantizeRows dsa_rt::cpu::quantize_rows_generic = dsa_rt::cpu::quantize_rows;
