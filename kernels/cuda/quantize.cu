// quantize_rows; docs/kernels/cuda.md has its bytes and floor.
//
// The row of a head belongs to 1 to 32 threads of a warp, up to four accesses of 16 bytes to each: it is read once, its
// largest element found by shuffles, and written once. What a head has beyond those is read a second time. Codes are
// made with integers, so it runs on cards without E4M3 too. The bits are the definition's, whose quotients a division
// rounds: see Quotient.
//
// A slot outside the cache stops the kernel before that row is touched, as the framework's indexing does.
#include "quantize.h"

#include <cmath>
#include <type_traits>

#include "../bits.h"
#include "common.cuh"

namespace dsa_rt::cuda {
namespace {

constexpr int threads = 256, held = 4;  // held: accesses of a thread
constexpr float float8_largest = 448.0f, smallest_normal = 1.17549435e-38f;

// |x| / scale as a division rounds it, where that is 2^-11 or more and the scale normal and at most 2^120; what is
// smaller is near enough, its code is 0. A product with 1 / scale is off by up to 1.5 units in the last place. A
// correction brings it within one, from where another gives the nearest (Markstein 1990), as long as remainders are
// exact: they are for a scale from 2^-80 on, so a smaller one is lifted, and x with it. A division takes more
// instructions, and a branch.
class Quotient {
 public:
  __device__ explicit Quotient(float scale)
      : lift_(scale < 0x1p-80f ? 0x1p64f : 1.0f), scale_(scale * lift_), inverse_(1.0f / scale_) {}

  __device__ float operator()(float x) const {
    const float size = fabsf(x) * lift_;
    float quotient = size * inverse_;
#pragma unroll
    for (int i = 0; i < 2; ++i) quotient = fmaf(fmaf(-quotient, scale_, size), inverse_, quotient);
    return quotient;
  }

 private:
  float lift_, scale_, inverse_;
};

// The code of the E4M3 number nearest to a magnitude, to even. A quotient is at most 448, up to its rounding: none has
// to be cut.
__device__ __forceinline__ uint32_t float8_code(float size) {
  const uint32_t bits = float_to_bits(size);
  const uint32_t normal = ((bits + 0x7FFFFu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
  const uint32_t subnormal = float_to_bits(size + 16384.0f) - 0x46800000u;  // multiples of 2^-9
  return size < 0x1p-6f ? subnormal : normal;
}

// The largest magnitude. Infinity and NaN do not count.
template <class T, int count>
__device__ __forceinline__ float largest(const Pack<T, count>& pack) {
  float most = 0;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const float size = fabsf(pack[k]);
    if (size < INFINITY) most = fmaxf(most, size);
  }
  return most;
}

template <class T, int count>
__device__ __forceinline__ void put_codes(uint8_t* p, const Pack<T, count>& pack, const Quotient& quotient) {
  Pack<uint8_t, count> codes;
#pragma unroll
  for (int k = 0; k < count; ++k) {
    const float x = pack[k];
    const uint32_t code = float8_code(quotient(x)) | (float_to_bits(x) >> 24 & 0x80u);
    codes.element[k] = fabsf(x) < INFINITY ? code : 0x7Fu;
  }
  put<true>(p, codes);
}

// A head of a row by 2^lane_bits threads, `count` elements in an access.
template <class T, int count>
__global__ __launch_bounds__(threads, 4) void quantize_rows_kernel(const __grid_constant__ QuantizeRowsParams p,
                                                                   int lane_bits) {
  const int lanes = 1 << lane_bits, lane = threadIdx.x & (lanes - 1);
  const int64_t index = (blockIdx.x * (int64_t)threads + threadIdx.x) >> lane_bits, batch = blockIdx.y;
  const bool there = index < p.active * p.heads;  // all threads of a warp shuffle
  const uint32_t item = there ? (uint32_t)index : 0, token = item / (uint32_t)p.heads, head = item % (uint32_t)p.heads;
  const int64_t place = p.slots ? p.slots[token] : token;
  if (there && (place < 0 || place >= p.all_rows)) __trap();

  const T* row = static_cast<const T*>(p.rows.data) + batch * p.rows.batch_stride + token * p.rows.row_stride +
                 head * p.rows.head_stride;
  const auto read = [&](int column) { return fetch<count, true, Reuse::once>(row + column); };
  const int dim = there ? (int)p.dim : 0, first = lane * count, step = lanes * count, rest = first + held * step;
  Pack<T, count> packs[held] = {};
#pragma unroll
  for (int i = 0; i < held; ++i)
    if (first + i * step < dim) packs[i] = read(first + i * step);
  float most = 0;
#pragma unroll
  for (int i = 0; i < held; ++i) most = fmaxf(most, largest(packs[i]));
  for (int column = rest; column < dim; column += step) most = fmaxf(most, largest(read(column)));
  for (int offset = lanes / 2; offset; offset /= 2) most = fmaxf(most, __shfl_xor_sync(0xFFFFFFFFu, most, offset));
  const float scale = fmaxf(most / float8_largest, smallest_normal);
  if (there && lane == 0) p.scale[batch * p.scale_batch_stride + place * p.scale_row_stride + head] = scale;

  const Quotient quotient(scale);
  uint8_t* out = static_cast<uint8_t*>(p.out.data) + batch * p.out.batch_stride + place * p.out.row_stride +
                 head * p.out.head_stride;
#pragma unroll
  for (int i = 0; i < held; ++i)
    if (first + i * step < dim) put_codes(out + first + i * step, packs[i], quotient);
  for (int column = rest; column < dim; column += step) put_codes(out + column, read(column), quotient);
}

}  // namespace

void quantize_rows(const QuantizeRowsParams& p, uintptr_t stream) {
  const int64_t items = p.active * p.heads, size = size_of(p.element);
  if (!p.batch || !items) return;
  const auto at_most = [](int64_t value, const char* of, int64_t most) {
    if (value > most)
      throw std::runtime_error("quantize_rows: " + std::to_string(value) + of + ", expected at most " +
                               std::to_string(most) + "; use another backend");
  };
  at_most(items, " heads of rows", UINT32_MAX);
  at_most(p.dim, " elements in a head", max_quantized);
  const auto run = [&](auto type, auto count) {
    int lane_bits = 0;
    while (lane_bits < 5 && (int64_t{held * count()} << lane_bits) < p.dim) ++lane_bits;
    launch("quantize_rows", quantize_rows_kernel<decltype(type), count()>,
           {((items << lane_bits) + threads - 1) / threads, p.batch, threads}, stream, p, lane_bits);
  };
  with_type(p.element, [&](auto type) {
    constexpr int vector = 16 / sizeof type;
    const bool aligned = p.dim % vector == 0 && aligned_heads(p.rows, size) && aligned_heads<vector>(p.out, 1);
    if (aligned)
      run(type, std::integral_constant<int, vector>{});
    else
      run(type, std::integral_constant<int, 1>{});
  });
}

}  // namespace dsa_rt::cuda
