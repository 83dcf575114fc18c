// The copy engine: tensor maps of [B, rows, H, D] tensors in bf16 or fp16, and the copy of a tile to shared memory.
//
// A map has five dimensions, (64 columns, rows, D / 64 slabs, H, B), so that one instruction brings a tile of all D
// columns in the layout of layout.cuh. What lies beyond the map's rows arrives as zeros.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "../../attention.h"
#include "barrier.cuh"
#include "layout.cuh"

namespace dsa_rt::cuda::hopper {

using TensorMap = CUtensorMap;

// The driver's encoder, found at first use: the module links against no driver.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (found != cudaDriverEntryPointSuccess) function = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encoder) throw std::runtime_error("active_attention: the driver has no cuTensorMapEncodeTiled (CUDA 12 has it)");
  return encoder;
}

// Rows 0 to `rows` of x; a copy brings `box_rows` of them. A stride counts only where its dimension has a second
// element: others are set to what the encoder accepts.
inline TensorMap rows_map(const Heads& x, int64_t batch, int64_t rows, int64_t heads, int64_t dim, int box_rows,
                          Element element = Element::bfloat16) {
  const auto type = element == Element::bfloat16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const auto bytes = [](int64_t stride, int64_t size) { return (cuuint64_t)(size > 1 ? 2 * stride : slab_row_bytes); };
  const cuuint64_t sizes[5] = {slab_columns, (cuuint64_t)rows, (cuuint64_t)(dim / slab_columns), (cuuint64_t)heads,
                               (cuuint64_t)batch};
  const cuuint64_t strides[4] = {bytes(x.row_stride, rows), slab_row_bytes, bytes(x.head_stride, heads),
                                 bytes(x.batch_stride, batch)};
  const cuuint32_t box[5] = {slab_columns, (cuuint32_t)box_rows, (cuuint32_t)(dim / slab_columns), 1, 1};
  const cuuint32_t every[5] = {1, 1, 1, 1, 1};
  TensorMap map;
  const CUresult result =
      tensor_map_encoder()(&map, type, 5, x.data, sizes, strides, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                           CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("active_attention: cuTensorMapEncodeTiled refused a tensor (CUresult " +
                             std::to_string((int)result) + ")");
  return map;
}

// Brings the box at `row` of that head to `tile`, a multiple of 1024 bytes in shared memory, and counts its bytes (all
// of the box's, zeros included) at `full`. For one thread.
__device__ __forceinline__ void load_rows(void* tile, const TensorMap& map, Barrier& full, int row, int head,
                                          int batch) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(&full)), "r"(0), "r"(row), "r"(0), "r"(head), "r"(batch)
      : "memory");
}

}  // namespace dsa_rt::cuda::hopper
