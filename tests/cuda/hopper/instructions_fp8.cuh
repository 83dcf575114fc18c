// A model of kernels/cuda/hopper/instructions_fp8.cuh, from the PTX ISA.
//
// What store_matrices() writes stays out of sight, NaN in its place, until the thread that gave the words says
// publish().
#pragma once

#include <array>

#include "layout_fp8.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace dsa_rt::cuda::hopper {

inline float e4m3_value(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  float size = exponent ? std::ldexp(1 + mantissa / 8.0f, exponent - 7) : std::ldexp(mantissa / 8.0f, -6);
  if ((code & 0x7F) == 0x7F) size = NAN;
  return code & 0x80 ? -size : size;
}

// Nearest, ties to the even code; at most 448.
inline uint8_t e4m3_code(float x) {
  if (x != x) return 0x7F;
  const float size = std::fabs(x);
  const int step = std::max(size > 0 ? std::ilogb(size) : -6, -6) - 3;  // of the binade: the last bit is 2^step
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(size, -step)), step);
  uint8_t code = 0x7E;
  if (rounded < 448) {
    const int exponent = rounded >= 0.015625f ? std::ilogb(rounded) : -7;
    code = exponent == -7 ? (uint8_t)std::ldexp(rounded, 9)
                          : (uint8_t)((exponent + 7) << 3 | ((int)std::ldexp(rounded, 3 - exponent) & 7));
  }
  return code | (std::signbit(x) ? 0x80 : 0);
}

inline uint32_t pack_e4m3(float a, float b, float c, float d) {
  return e4m3_code(a) | e4m3_code(b) << 8 | e4m3_code(c) << 16 | (uint32_t)e4m3_code(d) << 24;
}

inline float low_bf16(uint32_t pair) { return bf16_value(pair & 0xFFFF); }
inline float high_bf16(uint32_t pair) { return bf16_value(pair >> 16); }

// Bytes; a line's 16-byte pieces go where the swizzle of 64 or 128 bytes has them.
inline TensorMap codes_map(const Heads& x, int64_t batch, int64_t rows, int64_t heads, int64_t dim, int box_rows) {
  TensorMap map = {static_cast<const unsigned char*>(x.data),
                   {dim, rows, 1, heads, batch},
                   {1, x.row_stride, dim, x.head_stride, x.batch_stride},
                   {(int)dim, box_rows, 1, 1, 1}};
  map.item_bytes = 1;
  map.swizzle_pieces = dim == 128 ? 8 : 4;
  return map;
}

struct NumberCopies {
  int64_t begun[1024] = {}, ended[1024] = {};
};

inline void copy_number(float* to, const float* from, bool there) {
  const int thread = ::emulated::block->fiber().index.x;
  auto& copies = ::emulated::model<NumberCopies>();
  ::emulated::block->event(::emulated::Kind::copy, [=, &copies, number = copies.begun[thread]++] {
    if (copies.ended[thread] != number) return false;
    *to = there ? *from : 0;
    ++copies.ended[thread];
    return true;
  });
}

inline void arrive_when_copied(Barrier& barrier) {
  const int thread = ::emulated::block->fiber().index.x;
  auto& copies = ::emulated::model<NumberCopies>();
  ::emulated::block->event(::emulated::Kind::copy, [=, &copies, &barrier, number = copies.begun[thread]] {
    if (copies.ended[thread] < number) return false;
    if (barrier.pending == 0) ::emulated::block->fail_event("more arrivals at a barrier than it waits for");
    --barrier.pending;
    barrier.settle();
    return true;
  });
}

inline void load_transposed(uint32_t (&words)[4], const void* line) {
  const int lane = ::emulated::block->fiber().index.x % 32, row = lane / 4, pair = lane % 4;
  const auto* lines = ::emulated::model<::emulated::Collective<const void*, 32>>().all(line);
  for (int m = 0; m < 4; ++m) {
    uint16_t halves[2];
    for (int h = 0; h < 2; ++h)
      memcpy(&halves[h], static_cast<const unsigned char*>(lines[8 * m + 2 * pair + h]) + 2 * row, 2);
    words[m] = halves[0] | (uint32_t)halves[1] << 16;
  }
}

struct HiddenWrites {
  std::vector<std::pair<unsigned char*, uint32_t>> of[1024];
};

inline void store_matrices(void* line, const uint32_t (&words)[4]) {
  const int thread = ::emulated::block->fiber().index.x, lane = thread % 32;
  auto* const* lines = ::emulated::model<::emulated::Collective<void*, 32>>().all(line);
  for (int m = 0; m < 4; ++m) {
    unsigned char* to = static_cast<unsigned char*>(lines[8 * m + lane / 4]) + 4 * (lane % 4);
    memset(to, 0xFF, 4);
    ::emulated::model<HiddenWrites>().of[thread].push_back({to, words[m]});
  }
}

inline void publish() {
  auto& mine = ::emulated::model<HiddenWrites>().of[::emulated::block->fiber().index.x];
  for (const auto& [to, word] : mine) memcpy(to, &word, 4);
  mine.clear();
}

inline bool any_lane(bool value) {
  const bool* all = ::emulated::model<::emulated::Collective<bool, 32>>().all(value);
  return std::find(all, all + 32, true) != all + 32;
}

inline void sync_warp() { any_lane(false); }

inline uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t both = (uint64_t)high << 32 | low;
  uint32_t picked = 0;
  for (int i = 0; i < 4; ++i) picked |= (uint32_t)(both >> 8 * (which >> 4 * i & 7) & 0xFF) << 8 * i;
  return picked;
}

// How many bits of 8-bit products' sums are kept, or 0: as fp32.
inline int sum_bits = 0;

// acc and 32 products, cut to multiples of what is `bits` places below the largest.
inline float narrow_sum(float acc, const float* a, const float* b, int bits) {
  float most = std::fabs(acc);
  for (int k = 0; k < 32; ++k) most = std::max(most, std::fabs(a[k] * b[k]));
  if (!(most > 0 && most < INFINITY)) return acc + (most > 0 ? most : 0);
  const double unit = std::ldexp(1.0, std::ilogb(most) + 1 - bits);
  double sum = std::trunc(acc / unit);
  for (int k = 0; k < 32; ++k) sum += std::trunc(a[k] * b[k] / unit);
  return (float)(sum * unit);
}

// An m64nNk32 product of codes. B: lines of 64 or 128 bytes in swizzle of as many, eight of them one stride apart.
inline std::function<float(int, int, float)> add_codes(const Product& p, const uint32_t* const (&operands)[32]) {
  std::vector<float> a(16 * 32), b(p.columns * 32);
  for (int lane = 0; lane < 32; ++lane)
    for (int r = 0; r < 4; ++r)
      for (int n = 0; n < 4; ++n)
        a[(lane / 4 + r % 2 * 8) * 32 + r / 2 * 16 + lane % 4 * 4 + n] = e4m3_value(operands[lane][r] >> 8 * n & 0xFF);
  const uint32_t start = (p.b & 0x3FFF) << 4, stride = (p.b >> 32 & 0x3FFF) << 4, line = p.b >> 62 == 2 ? 64 : 128;
  if (p.b >> 62 != 1 && p.b >> 62 != 2) ::emulated::block->fail_event("a descriptor without swizzle of 64 or 128");
  if (p.b >> 49 & 7) ::emulated::block->fail_event("a descriptor with a base offset");
  if (start & (line == 128 ? 0x380 : 0x180)) ::emulated::block->fail_event("a matrix inside a swizzle atom");
  for (int n = 0; n < p.columns; ++n)
    for (int k = 0; k < 32; ++k) {
      const uint32_t address = start + n / 8 * stride + n % 8 * line + k;
      const uint32_t place = address ^ (address >> 7 & (line == 128 ? 7 : 3)) << 4;
      b[32 * n + k] = e4m3_value(memory[place - ::emulated::shared_start]);
    }
  return [a = std::move(a), b = std::move(b)](int m, int n, float sum) {
    if (sum_bits) return narrow_sum(sum, &a[32 * m], &b[32 * n], sum_bits);
    for (int k = 0; k < 32; ++k) sum += a[32 * m + k] * b[32 * n + k];
    return sum;
  };
}

template <bool accumulate, int n>
void multiply_codes(float (&d)[n], const uint32_t* a, uint64_t b) {
  ::emulated::model<Products>().issue({Element::bfloat16, d, 2 * n, a, 0, b, accumulate, add_codes});
}

}  // namespace dsa_rt::cuda::hopper
