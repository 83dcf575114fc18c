// quantize_rows on the CPU: a kernel for each instruction set, all with the same bits.
#pragma once

#include "../quantize.h"

namespace dsa_rt::cpu {

// On the flattened rows [begin, end) of batch·active.
using QuantizeRows = void (*)(const QuantizeRowsParams&, int64_t begin, int64_t end);

extern const QuantizeRows quantize_rows_generic;
#if defined(DSA_RT_X86)
extern const QuantizeRows quantize_rows_avx2;
extern const QuantizeRows quantize_rows_avx512;
#endif

}  // namespace dsa_rt::cpu
