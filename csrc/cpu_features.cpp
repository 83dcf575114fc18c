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
    unsigned a = 0, b = 0, c = 0, d = 0;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);  // of which not every compiler's builtin knows
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
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

int64_t last_cache() {
  static const int64_t found = [] {
    const int64_t bytes = 32 << 20;  // where the processor does not say; sysconf adds up caches that no core has to itself
#if defined(DSA_RT_X86)
    for (const unsigned leaf : {0x8000001Du, 4u}) {  // AMD's and Intel's, of one layout
      unsigned a = 0, b = 0, c = 0, d = 0;
      for (unsigned i = 0; i < 8 && __get_cpuid_count(leaf, i, &a, &b, &c, &d) && (a & 31); ++i)
        if ((a >> 5 & 7) == 3) return int64_t{(b >> 22) + 1} * ((b >> 12 & 1023) + 1) * ((b & 4095) + 1) * (int64_t{c} + 1);
    }
#endif
    return bytes;
  }();
  return found;
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
