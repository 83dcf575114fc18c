// linear on the CPU: a kernel for each instruction set and type of weights.
#pragma once

#include <stddef.h>

#include "../step.h"

namespace dsa_rt::cpu {

enum class Activation { none, gelu, gelu_erf, silu };  // gelu: its tanh form

// out = act(x·Wᵀ + bias), W [N, K] packed as LinearLayout says.
struct LinearParams {
  Rows out, x;         // [B, A, N], [B, A, K]
  const void* weight;  // panels
  const float* bias;   // [N] or null
  Activation activation;
  int64_t batch, active, n, k;
};

// W in panels of `panel` of its rows, the last one of what is left, rounded up to `lanes` with zeros. A panel is
// [steps][its rows][group]: `group` elements along K lie together, the last ones rounded up with zeros.
struct LinearLayout {
  const char* name;
  int64_t panel, lanes, group;

  int64_t steps(int64_t k) const { return (k + group - 1) / group; }
  int64_t padded(int64_t n) const { return (n + lanes - 1) / lanes * lanes; }
  int64_t elements(int64_t n, int64_t k) const { return padded(n) * steps(k) * group; }
};

constexpr int64_t linear_most_steps = 384;  // along K at once

// Sizes of a unit of work; columns a multiple of the panel, so that sums of all of them are [rows][columns].
struct LinearTile {
  int64_t rows, columns;
};

struct LinearKernel {
  LinearLayout layout;
  // Bytes that run() needs for such tiles; 64-byte alignment.
  size_t (*scratch_bytes)(const LinearParams&, LinearTile);
  // Works on the tiles [begin, end), those of the same columns beside each other. An element is one sum in the order
  // of K wherever it is computed, so that no tile, no split over threads and no other row changes a bit.
  void (*run)(const LinearParams&, LinearTile, void* scratch, int64_t begin, int64_t end);
};

struct LinearKernels {
  LinearKernel float32, bfloat16, float16;  // by the type of the weights
};

extern const LinearKernels linear_generic;
#if defined(DSA_RT_X86)
extern const LinearKernels linear_avx2;
extern const LinearKernels linear_avx512;
#endif
#if defined(DSA_RT_AVX512_BF16)
extern const LinearKernel linear_avx512_bf16;  // bf16 weights only
#endif

}  // namespace dsa_rt::cpu
