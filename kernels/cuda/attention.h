// Attention of the active queries to the rows of a cache, on CUDA: launchers. `stream` is a cudaStream_t as an integer;
// the caller has made the tensors' device current. Nothing is allocated and nothing waits.
#pragma once

#include <stdint.h>

#include <string>

#include "../attention.h"

namespace dsa_rt::cuda {

// Whether active_attention takes these arguments on the current device, one of compute capability 9.0; else `why` is a
// clause that says what it does not take. The arguments are checked ones: ranges inside [0, rows), counts that sum up.
bool attention_supported(const AttentionParams&, std::string* why);

// How many fp32 numbers of scratch let active_attention split the keys of these arguments on the current device; 0 where
// it would not, or where attention_supported refuses them.
int64_t attention_scratch(const AttentionParams&);

// scratch: at a multiple of 16 bytes, as much as attention_scratch says; null: nothing is split. It may be used again
// once the stream is past this call. Throws std::runtime_error for what attention_supported refuses and for a failed
// launch. Segments are copied.
void active_attention(const AttentionParams&, float* scratch, uintptr_t stream);

// The same with K and V in E4M3 and bf16 queries.
bool attention_fp8_supported(const ScaledAttentionParams&, std::string* why);
int64_t attention_fp8_scratch(const ScaledAttentionParams&);
void active_attention_fp8(const ScaledAttentionParams&, float* scratch, uintptr_t stream);

}  // namespace dsa_rt::cuda
