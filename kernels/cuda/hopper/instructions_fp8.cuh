// What attention on E4M3 needs beside barrier, tma, wgmma and registers.cuh: products of 8-bit codes, copies of codes
// and of their scales, matrices of 8 x 8 words on their way between registers and shared memory, rounding.
#pragma once

#include <stdint.h>

#include "layout_fp8.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

namespace dsa_rt::cuda::hopper {

// Rows 0 to `rows` of x [B, rows, H, D] of codes, to be brought by load_rows: 128 rows of D bytes in the swizzle of
// layout_fp8.cuh. The third dimension is there for load_rows alone.
inline TensorMap codes_map(const Heads& x, int64_t batch, int64_t rows, int64_t heads, int64_t dim, int box_rows) {
  const auto bytes = [&](int64_t stride, int64_t size) { return (cuuint64_t)(size > 1 ? stride : dim); };
  const cuuint64_t sizes[5] = {(cuuint64_t)dim, (cuuint64_t)rows, 1, (cuuint64_t)heads, (cuuint64_t)batch};
  const cuuint64_t strides[4] = {bytes(x.row_stride, rows), (cuuint64_t)dim, bytes(x.head_stride, heads),
                                 bytes(x.batch_stride, batch)};
  const cuuint32_t box[5] = {(cuuint32_t)dim, (cuuint32_t)box_rows, 1, 1, 1};
  const cuuint32_t every[5] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 5, x.data, sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
      dim == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("active_attention_fp8: cuTensorMapEncodeTiled refused a tensor (CUresult " +
                             std::to_string((int)result) + ")");
  return map;
}

// Copies a number to shared memory, or 0 where it is not there; asynchronous, in the generic proxy.
__device__ __forceinline__ void copy_number(float* to, const float* from, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(there ? 4 : 0)
               : "memory");
}

// Arrives once this thread's copies of numbers so far are there.
__device__ __forceinline__ void arrive_when_copied(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Four 8 x 8 matrices of 16-bit words, transposed: lanes 8 m to 8 m + 7 give the addresses of matrix m's lines of 16
// bytes. A lane gets from each the words (2 c, r) and (2 c + 1, r), r = lane / 4, c = lane % 4, line first, as the
// lower and the upper half.
__device__ __forceinline__ void load_transposed(uint32_t (&words)[4], const void* line) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(shared_address(line))
               : "memory");
}

// The same way back, not transposed: a lane gives the words (r, 2 c) and (r, 2 c + 1).
__device__ __forceinline__ void store_matrices(void* line, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(line)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// Makes what this thread wrote to shared memory visible to products, before it arrives at a barrier that says so.
__device__ __forceinline__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ bool any_lane(bool value) { return __any_sync(0xFFFFFFFFu, value); }

// Four of the eight bytes of high:low, by the nibbles of `which`.
__device__ __forceinline__ uint32_t pick_bytes(uint32_t low, uint32_t high, uint32_t which) {
  return __byte_perm(low, high, which);
}

// Four floats as E4M3, the first in the lowest byte: nearest even, at most 448, NaN stays NaN.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
  uint32_t codes;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(codes)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return codes;
}

// The numbers of two bf16 in a word.
__device__ __forceinline__ float low_bf16(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_bf16(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

#define DSA_RT_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSA_RT_REGISTERS_64 \
  DSA_RT_REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DSA_RT_FLOATS_8(d, i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define DSA_RT_FLOATS_32(d, i) \
  DSA_RT_FLOATS_8(d, i), DSA_RT_FLOATS_8(d, i + 8), DSA_RT_FLOATS_8(d, i + 16), DSA_RT_FLOATS_8(d, i + 24)

// d = a bT, plus d where `accumulate`: a [64, 32] in registers (layout_fp8.cuh: operand_word), b [128, 32] K-major in
// shared memory, both E4M3.
template <bool accumulate>
__device__ __forceinline__ void multiply_codes(float (&d)[64], const uint32_t* a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" DSA_RT_REGISTERS_64
      "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1;\n"
      "}"
      : DSA_RT_FLOATS_32(d, 0), DSA_RT_FLOATS_32(d, 32)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(accumulate ? 1 : 0));
}

// The same for b [64, 32].
template <bool accumulate>
__device__ __forceinline__ void multiply_codes(float (&d)[32], const uint32_t* a, uint64_t b) {
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.b32 accumulate, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" DSA_RT_REGISTERS_32
      "}, {%32, %33, %34, %35}, %36, accumulate, 1, 1;\n"
      "}"
      : DSA_RT_FLOATS_32(d, 0)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(accumulate ? 1 : 0));
}

#undef DSA_RT_REGISTERS_32
#undef DSA_RT_REGISTERS_64
#undef DSA_RT_FLOATS_8
#undef DSA_RT_FLOATS_32

}  // namespace dsa_rt::cuda::hopper
