// One number per video: no instruction set of its own, no threads.
#include <cmath>
#include <cstring>

#include "step.h"

namespace dsa_rt::cpu {

void exit_decision(const ExitDecisionParams& p) {
  for (int64_t i = 0; i < p.batch; ++i) {
    float logit;
    if (p.logit_element == Element::float32) {
      logit = static_cast<const float*>(p.logit)[i];
    } else {
      const uint32_t bits = uint32_t{static_cast<const uint16_t*>(p.logit)[i]} << 16;
      std::memcpy(&logit, &bits, sizeof logit);
    }
    // fp64, then one rounding: devices whose exponentials differ in the last place still agree on the fp32 result.
    p.confidence[i] = static_cast<float>(1.0 / (1.0 + std::exp(-static_cast<double>(logit))));
    p.refine[i] = p.confidence[i] < p.threshold[i];
  }
}

}  // namespace dsa_rt::cpu
