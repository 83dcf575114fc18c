#include "cpu_features.h"

#include "tensor.h"

#if defined(DSA_RT_X86)
#include <cpuid.h>
#endif

namespace dsa_rt {

const std::vector<std::pair<InstructionSet, std::string>>& instruction_sets() {
  static const auto found = [] {
    std::vector<std::pair<InstructionSet, std::string>> sets;
#if defined(DSA_RT_X86)
    __builtin_cpu_init();  // reads the operating system's part too: registers it does not save are not reported
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(DSA_RT_AVX512_BF16)
    if (avx512 && __builtin_cpu_supports("avx512bf16")) sets.emplace_back(InstructionSet::avx512_bf16, "avx512_bf16");
#endif
    if (avx512) sets.emplace_back(InstructionSet::avx512, "avx512");
    if (avx2) sets.emplace_back(InstructionSet::avx2, "avx2");
#endif
    sets.emplace_back(InstructionSet::generic, "generic");
    return sets;
  }();
  return found;
}

InstructionSet choose_instruction_set(const std::string& name) {
  if (name.empty()) return instruction_sets().front().first;
  for (const auto& [set, set_name] : instruction_sets())
    if (set_name == name) return set;
  std::string known;
  for (const auto& [set, set_name] : instruction_sets()) known += (known.empty() ? "" : ", ") + set_name;
  throw OptionError("instruction set '" + name + "' does not run here, expected one of " + known);
}

bool has_amx_bf16() {
#if defined(DSA_RT_X86)
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
  return false;
#endif
}

}  // namespace dsa_rt
