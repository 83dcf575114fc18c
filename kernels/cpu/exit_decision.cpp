// One number per video: no instruction set of its own, no threads.
#include <cmath>

#include "rows.h"
#include "step.h"

namespace dsa_rt::cpu {

void exit_decision(const ExitDecisionParams& p) {
  with_type(p.logit_element, [&](auto type) {
    const auto* logit = static_cast<const decltype(type)*>(p.logit);
    for (int64_t i = 0; i < p.batch; ++i) {
      // fp64, then one rounding: devices whose exponentials differ in the last place still agree on the fp32 result.
      p.confidence[i] = static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(load(logit + i)))));
      p.refine[i] = p.confidence[i] < p.threshold[i];
    }
  });
}

}  // namespace dsa_rt::cpu
