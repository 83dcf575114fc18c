// AVX-512 with bf16 dot products: a unit is two elements along K, of which vdpbf16ps adds both products to an fp32 lane.
#include "linear_impl.h"
#include "vectors_avx512.h"

namespace dsa_rt::cpu {
namespace {

struct Bf16Dots : Avx512 {
  using Weight = BFloat16;
  using Element = BFloat16;
  using Unit = uint32_t;
  using Panel = uint32_t;
  using Units = __m512i;
  static constexpr int group = 2;

  static Units units(const Panel* p) { return _mm512_loadu_si512(p); }
  static Units repeat(const Element* p) {
    int pair;
    memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Vec multiply_add(Vec total, Units a, Units b) { return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b); }
};

}  // namespace

const LinearKernel linear_avx512_bf16 = linear_kernel<Bf16Dots>("avx512_bf16");

}  // namespace dsa_rt::cpu
