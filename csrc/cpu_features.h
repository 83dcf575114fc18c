// Which compiled instruction sets this processor runs, and which one to use.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace dsa_rt {

enum class InstructionSet { generic, avx2, avx512, avx512_bf16 };

// Best first.
const std::vector<std::pair<InstructionSet, std::string>>& instruction_sets();

// The best one, or the one asked for by name; throws OptionError where it cannot run here.
InstructionSet choose_instruction_set(const std::string& name);

// Bytes of the last cache that a core reaches.
int64_t last_cache();

// Whether an op that writes so many bytes writes them past the caches: the next op would find little of them there.
inline bool streams(int64_t bytes_written) { return bytes_written >= last_cache() / 4 * 3; }

// Whether the processor multiplies bf16 matrices in a unit of its own.
bool has_amx_bf16();

}  // namespace dsa_rt
