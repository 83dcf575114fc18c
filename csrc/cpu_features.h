// Which compiled instruction sets this processor runs, and which one to use.
#pragma once

#include <string>
#include <vector>

namespace dsa_rt {

enum class InstructionSet { generic, avx2, avx512, avx512_bf16 };

// Best first.
const std::vector<std::pair<InstructionSet, std::string>>& instruction_sets();

// The best one, or the one asked for by name; throws OptionError where it cannot run here.
InstructionSet choose_instruction_set(const std::string& name);

// Whether the processor multiplies bf16 matrices in a unit of its own.
bool has_amx_bf16();

}  // namespace dsa_rt
