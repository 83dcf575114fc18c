// Where elements lie: shared-memory tiles, the descriptors that wgmma reads them by, and the fragments in registers.
// Plain arithmetic, from the PTX ISA's chapter on wgmma; tests/cuda/test_attention_layouts.py checks it against a model
// of that chapter.
//
// A tile of R rows of D bf16 lies in D / 64 slabs. A slab is R rows of 64 columns, 128 bytes a row, and the 16-byte
// pieces of a row are permuted by the row's number modulo 8 (128-byte swizzle): piece p of row r lies at p ^ r % 8.
// TMA writes this order and wgmma undoes it, both on address bits, so slabs start at multiples of 1024 bytes.
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)
#define DSA_RT_HOST_DEVICE __host__ __device__
#else
#define DSA_RT_HOST_DEVICE
#endif

namespace dsa_rt::cuda::hopper {

constexpr int slab_columns = 64, slab_row_bytes = 128, swizzle_atom_bytes = 1024;  // an atom: 8 rows of a slab
constexpr int mma_depth = 16, mma_rows = 64;                                       // of one wgmma on bf16

// A matrix descriptor: start address, "leading" and "stride" byte offsets in units of 16 bytes, 128-byte swizzle. The
// descriptor of a place `bytes` further on is descriptor + further(bytes): addresses stay below 2^18, no carry.
DSA_RT_HOST_DEVICE constexpr uint64_t further(uint32_t bytes) { return bytes >> 4; }
DSA_RT_HOST_DEVICE constexpr uint64_t descriptor(uint32_t address, uint32_t leading_bytes, uint32_t stride_bytes) {
  return (address & 0x3FFFF) >> 4 | further(leading_bytes) << 16 | further(stride_bytes) << 32 | (uint64_t)1 << 62;
}

// Q and K: the summed dimension (D) is contiguous, "K-major". Step s sums columns 16 s to 16 s + 15. The leading offset
// is unused in swizzled K-major layouts (set to 1 unit); eight rows further lies the next atom.
DSA_RT_HOST_DEVICE constexpr uint64_t k_major(uint32_t tile) { return descriptor(tile, 16, swizzle_atom_bytes); }
DSA_RT_HOST_DEVICE constexpr uint64_t k_major_step(int step, int slab_rows) {
  constexpr int steps_per_slab = slab_columns / mma_depth;
  return further(step / steps_per_slab * slab_rows * slab_row_bytes + step % steps_per_slab * mma_depth * 2);
}

// V: the summed dimension is the rows, the other one (D) is contiguous, "MN-major". Step s sums rows 16 s to 16 s + 15:
// two atoms, one stride offset apart. The leading offset leads to the next 64 columns, the next slab.
DSA_RT_HOST_DEVICE constexpr uint64_t mn_major(uint32_t tile, int slab_rows) {
  return descriptor(tile, slab_rows * slab_row_bytes, swizzle_atom_bytes);
}
DSA_RT_HOST_DEVICE constexpr uint64_t mn_major_step(int step) { return further(step * mma_depth * slab_row_bytes); }

// Accumulators of an m64nN wgmma: thread t of the warpgroup holds d[4 j + 2 i + c] at row fragment_row(t) + 8 i and
// column 8 j + fragment_column(t) + c, for i and c in 0..1.
DSA_RT_HOST_DEVICE constexpr int fragment_row(int thread) { return thread / 32 * 16 + thread % 32 / 4; }
DSA_RT_HOST_DEVICE constexpr int fragment_column(int thread) { return thread % 4 * 2; }

// The A operand of an m64k16 wgmma in registers: four pairs, pair 2 h + i at row fragment_row(t) + 8 i and columns
// 8 h + fragment_column(t) + 0..1. So the pairs of step s are the accumulators d[8 s], d[8 s + 1] | d[8 s + 2], ... of
// the same thread, in order: scores become the operand of the next product without any exchange.
DSA_RT_HOST_DEVICE constexpr int operand_pair(int step, int pair) { return 8 * step + 2 * pair; }

}  // namespace dsa_rt::cuda::hopper
