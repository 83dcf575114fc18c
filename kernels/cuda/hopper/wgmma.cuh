// Warpgroup matrix products (wgmma) on bf16 or fp16 with fp32 accumulators, asynchronous.
//
// In flight from multiply() until finish() says so: until then neither accumulators nor operands in registers may be
// touched, which the compiler cannot know. start() and finish() therefore take the register arrays, as an assembler
// statement that pretends to change them and so cannot be crossed by their uses.
#pragma once

#include <stdint.h>

#include "../../element.h"

namespace dsa_rt::cuda::hopper {

__device__ __forceinline__ void pin(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ __forceinline__ void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

template <class T, int n>
__device__ __forceinline__ void pin(T (&registers)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) pin(registers[i]);
}

// Before multiply(), where registers that it takes were touched since the last.
template <class... Arrays>
__device__ __forceinline__ void start(Arrays&... registers) {
  (pin(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

// Closes the group of products since the last.
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the `pending` youngest groups are in flight; `registers` are those of the groups that ended.
template <int pending, class... Arrays>
__device__ __forceinline__ void finish(Arrays&... registers) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
  (pin(registers), ...);
}

#define DSA_RT_REGISTERS_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DSA_RT_REGISTERS_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define DSA_RT_FLOATS_8(d, i)                                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define DSA_RT_FLOATS_32(d, i) \
  DSA_RT_FLOATS_8(d, i), DSA_RT_FLOATS_8(d, i + 8), DSA_RT_FLOATS_8(d, i + 16), DSA_RT_FLOATS_8(d, i + 24)

#define DSA_RT_SHARED_BY_SHARED(kind)                                                                     \
  asm volatile(                                                                                          \
      "{\n"                                                                                              \
      ".reg .pred accumulate;\n"                                                                         \
      "setp.ne.b32 accumulate, %66, 0;\n"                                                                \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." kind "." kind " {" DSA_RT_REGISTERS_64              \
      "}, %64, %65, accumulate, 1, 1, 0, 0;\n"                                                           \
      "}"                                                                                                \
      : DSA_RT_FLOATS_32(d, 0), DSA_RT_FLOATS_32(d, 32)                                                  \
      : "l"(a), "l"(b), "n"(accumulate ? 1 : 0))
#define DSA_RT_REGISTERS_BY_SHARED(columns, kind, registers, a0, a1, a2, a3, b_at, ...)                   \
  asm volatile(                                                                                          \
      "{\n"                                                                                              \
      ".reg .pred accumulate;\n"                                                                         \
      "setp.eq.b32 accumulate, 0, 0;\n"                                                                  \
      "wgmma.mma_async.sync.aligned.m64n" columns "k16.f32." kind "." kind " {" registers                \
      "}, {" a0 ", " a1 ", " a2 ", " a3 "}, " b_at ", accumulate, 1, 1, 1;\n"                            \
      "}"                                                                                                \
      : __VA_ARGS__                                                                                      \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d = a bT, plus d where `accumulate`: a [64, 16] and b [128, 16], both K-major in shared memory.
template <Element element, bool accumulate>
__device__ __forceinline__ void multiply(float (&d)[64], uint64_t a, uint64_t b) {
  if constexpr (element == Element::bfloat16)
    DSA_RT_SHARED_BY_SHARED("bf16");
  else
    DSA_RT_SHARED_BY_SHARED("f16");
}

// d += a b: a [64, 16] in registers (layout.cuh: operand_pair), b [16, 128] MN-major in shared memory.
template <Element element>
__device__ __forceinline__ void multiply(float (&d)[64], const uint32_t* a, uint64_t b) {
#define DSA_RT_PRODUCT(kind)                                                                    \
  DSA_RT_REGISTERS_BY_SHARED("128", kind, DSA_RT_REGISTERS_64, "%64", "%65", "%66", "%67", "%68", \
                             DSA_RT_FLOATS_32(d, 0), DSA_RT_FLOATS_32(d, 32))
  if constexpr (element == Element::bfloat16)
    DSA_RT_PRODUCT("bf16");
  else
    DSA_RT_PRODUCT("f16");
#undef DSA_RT_PRODUCT
}

// The same for b [16, 64].
template <Element element>
__device__ __forceinline__ void multiply(float (&d)[32], const uint32_t* a, uint64_t b) {
#define DSA_RT_PRODUCT(kind) \
  DSA_RT_REGISTERS_BY_SHARED("64", kind, DSA_RT_REGISTERS_32, "%32", "%33", "%34", "%35", "%36", DSA_RT_FLOATS_32(d, 0))
  if constexpr (element == Element::bfloat16)
    DSA_RT_PRODUCT("bf16");
  else
    DSA_RT_PRODUCT("f16");
#undef DSA_RT_PRODUCT
}

#undef DSA_RT_SHARED_BY_SHARED
#undef DSA_RT_REGISTERS_BY_SHARED
#undef DSA_RT_REGISTERS_32
#undef DSA_RT_REGISTERS_64
#undef DSA_RT_FLOATS_8
#undef DSA_RT_FLOATS_32

}  // namespace dsa_rt::cuda::hopper
