// Where E4M3 codes lie, beside layout.cuh's bf16: tiles of K and V as TMA brings them, V transposed, the order of keys
// in it, and the fragments of 8-bit products. Plain arithmetic; tests/cuda/test_attention_fp8_layouts.py checks it.
//
// A tile of 128 rows of D codes has lines of D bytes, whose 16-byte pieces TMA permutes on address bits: 128-byte
// swizzle for D = 128, 64-byte swizzle for D = 64. Eight lines are an atom.
//
// 8-bit products sum along contiguous bytes only, so V [keys][D] becomes [D][slots], lines of 128 bytes in 128-byte
// swizzle. Slot 16 h + 4 c + 2 b + e holds key 16 h + 8 b + 2 c + e: the order in which a thread has its weights, see
// weight().
#pragma once

#include <stdint.h>

#include "layout.cuh"

namespace dsa_rt::cuda::hopper {

constexpr int code_depth = 32;  // summed by one wgmma on E4M3
constexpr int slot_line_bytes = 128;

// The place of byte `offset` of a tile that starts at a multiple of 1024 bytes.
template <int line_bytes>
DSA_RT_HOST_DEVICE constexpr uint32_t swizzled(uint32_t offset) {
  static_assert(line_bytes == 64 || line_bytes == 128);
  return offset ^ (offset >> 7 & (line_bytes == 128 ? 7 : 3)) << 4;
}

// Codes with the summed dimension contiguous: K, lines of D bytes, and the transposed V. Step s sums bytes 32 s to 32 s
// + 31 of each line. Bits 62 and 63 are 1 for 128-byte swizzle and 2 for 64-byte swizzle.
template <int line_bytes>
DSA_RT_HOST_DEVICE constexpr uint64_t codes_k_major(uint32_t tile) {
  return descriptor(tile, 16, 8 * line_bytes) + (line_bytes == 64 ? (uint64_t)1 << 62 : 0);
}
DSA_RT_HOST_DEVICE constexpr uint64_t codes_step(int step) { return further(step * code_depth); }

DSA_RT_HOST_DEVICE constexpr int slot_of(int key) {
  return (key & ~15) | (key & 6) << 1 | (key >> 3 & 1) << 1 | (key & 1);
}

// The A operand of an m64k32 wgmma in registers: four words of four codes, word 2 h + i at row fragment_row(t) + 8 i
// and columns 16 h + 4 (t % 4) + 0..3. Columns 16 g to 16 g + 15 of a row of many steps are in this word:
DSA_RT_HOST_DEVICE constexpr int operand_word(int g, int i) { return 4 * (g / 2) + 2 * (g % 2) + i; }

// Code n of the word for slots 16 g + 4 (t % 4) + 0..3 is this accumulator of the scores, of the same thread.
DSA_RT_HOST_DEVICE constexpr int weight(int g, int i, int n) { return 8 * g + 4 * (n / 2) + 2 * i + n % 2; }

// Transposition, a warp at a time: 32 keys of 16 channels, four 8 x 8 matrices of pairs of channels on their way in,
// four of 16 slots of 8 channels on their way out. Where a lane's line of its matrix is read:
template <int D>
DSA_RT_HOST_DEVICE constexpr uint32_t line_read(int keys, int channels, int lane) {
  return swizzled<D>((32 * keys + lane) * D + 16 * channels);
}
// Transposed on the way in, a lane has keys 2 c, 2 c + 1 of channels 2 r, 2 r + 1 (r = lane / 4, c = lane % 4) in a
// word; with the word for keys 8 further that makes slots 4 c to 4 c + 3 of both channels. The matrix that goes out
// first has the even channel from lanes 0 to 15 and the odd one from lanes 16 to 31, the other one the rest: so a
// matrix's eight lines differ modulo 8, and the swizzle spreads them over all banks.
DSA_RT_HOST_DEVICE constexpr uint32_t bytes_picked(int lane, int matrix) {
  return (lane >= 16) == matrix ? 0x6420 : 0x7531;  // even : odd
}
// Where a lane's line is written: matrices 0 and 1 have the first 16 of the 32 slots, 2 and 3 the others.
DSA_RT_HOST_DEVICE constexpr uint32_t line_written(int keys, int channels, int lane) {
  const int matrix = lane / 8, line = lane % 8;
  const int channel = 16 * channels + 2 * line + ((line >= 4) != matrix % 2);
  return swizzled<slot_line_bytes>(channel * slot_line_bytes + 32 * keys + 16 * (matrix / 2));
}

}  // namespace dsa_rt::cuda::hopper
