// Types of tensor elements that kernels read and write.
#pragma once

namespace dsa_rt {

enum class Element : int { float32, bfloat16, float16 };

}  // namespace dsa_rt
