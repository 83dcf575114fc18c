// A model of kernels/cuda/hopper/tma.cuh: what a tensor map says, and the copy with its swizzle, zeros outside.
#pragma once

#include <string.h>

#include "../../attention.h"
#include "barrier.cuh"
#include "device.h"

namespace dsa_rt::cuda::hopper {

struct TensorMap {
  const unsigned char* data;
  int64_t sizes[5], strides[5];  // strides in bytes
  int box[5];
  int item_bytes = 2, swizzle_pieces = 8;  // of an element; 16-byte pieces that the swizzle permutes
};

inline TensorMap rows_map(const Heads& x, int64_t batch, int64_t rows, int64_t heads, int64_t dim, int box_rows,
                          Element = Element::bfloat16) {  // bits are copied
  return {static_cast<const unsigned char*>(x.data),
          {64, rows, dim / 64, heads, batch},
          {2, 2 * x.row_stride, 128, 2 * x.head_stride, 2 * x.batch_stride},
          {64, box_rows, (int)(dim / 64), 1, 1},
          2,
          8};
}

inline void load_rows(void* tile, const TensorMap& map, Barrier& full, int row, int head, int batch) {
  if (shared_address(tile) % 1024) ::emulated::block->fail("a tile off the multiples of 1024 bytes");
  ::emulated::block->event(::emulated::Kind::copy, [=, &map, &full] {
    const int64_t start[5] = {0, row, 0, head, batch};
    const uint32_t first = shared_address(tile);
    uint32_t piece = 0;  // 16 bytes of the box, in the order of its dimensions
    int64_t at[5];
    for (at[4] = 0; at[4] < map.box[4]; ++at[4])
      for (at[3] = 0; at[3] < map.box[3]; ++at[3])
        for (at[2] = 0; at[2] < map.box[2]; ++at[2])
          for (at[1] = 0; at[1] < map.box[1]; ++at[1])
            for (at[0] = 0; at[0] < map.box[0]; at[0] += 16 / map.item_bytes, ++piece) {
              int64_t offset = 0;
              bool inside = true;
              for (int d = 0; d < 5; ++d) {
                const int64_t place = start[d] + at[d];
                inside &= place >= 0 && place < map.sizes[d];
                offset += place * map.strides[d];
              }
              const uint32_t address = first + 16 * piece;
              const uint32_t swizzled = address ^ (address >> 7 & (map.swizzle_pieces - 1)) << 4;
              unsigned char* to = memory + (swizzled - ::emulated::shared_start);
              if (inside)
                memcpy(to, map.data + offset, 16);
              else
                memset(to, 0, 16);
            }
    full.bytes -= 16 * piece;
    full.settle();
    return true;
  });
}

}  // namespace dsa_rt::cuda::hopper
