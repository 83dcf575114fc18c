// The memory-bound transformer ops; docs/kernels/cuda.md has their bytes, floors and choices.
//
// norm_modulate, rms_norm, qk_norm_rope_store: a row is read once, lives in the registers of a warp (up to 1536 channels) or of a
// block, and is written once. All loads are issued before the first store. Arithmetic is fp32, fused where it says so
// (compile with -fmad=false); a stored value is rounded once. move_rows: up to 32 threads per row, four accesses of each
// in flight.
//
// A row index outside its tensor stops the kernel before that row is touched, as the framework's indexing does.
#include "layers.h"

#include "common.cuh"

namespace dsa_rt::cuda {
namespace {

constexpr int warp_rows = 4;  // rows, each of one warp, in a block

// How a row lies in registers: `accesses` of `count` elements per thread, side by side over a warp or a block.
template <class T_, int count_, int accesses_, bool whole_block_>
struct RowLayout {
  using T = T_;
  static constexpr int count = count_, accesses = accesses_;
  static constexpr bool whole_block = whole_block_, aligned = count * sizeof(T) == 16;
  static constexpr int max_threads = whole_block ? 512 : warp_rows * warp;
  static constexpr int min_blocks = whole_block || !aligned || sizeof(T) == 4 ? 1 : 5;  // at once: at most 96 registers

  __device__ static int64_t row() {
    return whole_block ? blockIdx.x : blockIdx.x * (int64_t)warp_rows + threadIdx.x / warp;
  }
  __device__ static int column(int access) {
    const int threads = whole_block ? blockDim.x : warp;
    return (access * threads + (whole_block ? threadIdx.x : threadIdx.x % warp)) * count;
  }
  static Grid grid(int64_t rows, int64_t batch, int64_t width) {
    if (!whole_block) return {(rows + warp_rows - 1) / warp_rows, batch, max_threads};
    const int64_t warps = (width + warp * count * accesses - 1) / (warp * count * accesses);
    return {rows, batch, static_cast<int>(warps) * warp};
  }
};

// Calls body with the layout for rows of `width` elements; `narrow`: elements handled together where not aligned.
template <class T, int narrow, class Body>
void with_layout(const char* op, bool aligned, int64_t width, Body body) {
  if (width > max_row_width)
    throw std::runtime_error(std::string(op) + ": rows of " + std::to_string(width) + " elements, expected at most " +
                             std::to_string(max_row_width) + "; use another backend");
  if (!aligned) {
    if (width <= 16 * warp) return body(RowLayout<T, narrow, 16 / narrow, false>{});
    return body(RowLayout<T, narrow, 16 / narrow, true>{});
  }
  constexpr int count = 16 / sizeof(T);
  if (width <= 8 * warp) return body(RowLayout<T, count, 8 / count, false>{});
  if (width <= 16 * warp) return body(RowLayout<T, count, 16 / count, false>{});
  if (width <= 32 * warp) return body(RowLayout<T, count, 32 / count, false>{});
  if (width <= 48 * warp) return body(RowLayout<T, count, 48 / count, false>{});
  body(RowLayout<T, count, 16 / count, true>{});
}

bool aligned_table(const Modulation& table) {
  return aligned16(table.data, table.batch_stride * 4, table.row_stride * 4);
}

// The sum over a row's threads, the same bits in each. Sums that follow each other take turns between two `places`.
template <class Layout>
__device__ float row_sum(float value, int place) {
  value = warp_sum(value);
  if constexpr (Layout::whole_block) {
    __shared__ float parts[2][warp];
    const int lane = threadIdx.x % warp;
    if (lane == 0) parts[place][threadIdx.x / warp] = value;
    __syncthreads();
    value = warp_sum(lane < (int)blockDim.x / warp ? parts[place][lane] : 0.0f);
  }
  return value;
}

template <class Layout>
__global__ __launch_bounds__(Layout::max_threads, Layout::min_blocks) void norm_modulate_kernel(
    const __grid_constant__ NormModulateParams p) {
  using T = typename Layout::T;
  constexpr int count = Layout::count, accesses = Layout::accesses;
  constexpr bool aligned = Layout::aligned;
  const int64_t token = Layout::row(), batch = blockIdx.y;
  const int width = (int)p.width;
  if (token >= p.active) return;
  const int64_t table_row = p.table_rows ? p.table_rows[token] : 0;
  if (p.table_rows && (table_row < 0 || table_row >= p.table_length)) __trap();
  const auto table_at = [&](const Modulation& table, int column) {
    return fetch<count, aligned, Reuse::again>(table.data + batch * table.batch_stride + table_row * table.row_stride +
                                               column);
  };

  const T* x = row_of<const T>(p.x, batch, token);
  Pack<T, count> packs[accesses];
#pragma unroll
  for (int i = 0; i < accesses; ++i)
    if (Layout::column(i) < width) packs[i] = fetch<count, aligned, Reuse::once>(x + Layout::column(i));
  if (p.y.data) {
    const T* y = row_of<const T>(p.y, batch, token);
    T* sum = row_of<T>(p.sum, batch, token);
    Pack<T, count> other[accesses];
#pragma unroll
    for (int i = 0; i < accesses; ++i)
      if (Layout::column(i) < width) other[i] = fetch<count, aligned, Reuse::once>(y + Layout::column(i));
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      if (Layout::column(i) >= width) continue;
      float added[count];
#pragma unroll
      for (int k = 0; k < count; ++k) added[k] = other[i][k];
      if (p.gate.data) {
        const auto gate = table_at(p.gate, Layout::column(i));
#pragma unroll
        for (int k = 0; k < count; ++k) added[k] *= gate[k];
      }
#pragma unroll
      for (int k = 0; k < count; ++k) added[k] += packs[i][k];  // the bits of the definition: not fused
      round_to(packs[i], added);
      put<aligned>(sum + Layout::column(i), packs[i]);
    }
  }

  float total = 0, squares = 0;
#pragma unroll
  for (int i = 0; i < accesses; ++i)
    if (Layout::column(i) < width)
#pragma unroll
      for (int k = 0; k < count; ++k) total += packs[i][k];
  const float mean = row_sum<Layout>(total, 0) / (float)width;
#pragma unroll
  for (int i = 0; i < accesses; ++i)
    if (Layout::column(i) < width)
#pragma unroll
      for (int k = 0; k < count; ++k) squares = fmaf(packs[i][k] - mean, packs[i][k] - mean, squares);
  const float inverse = rsqrtf(row_sum<Layout>(squares, 1) / (float)width + p.eps);

  T* out = row_of<T>(p.out, batch, token);
#pragma unroll
  for (int i = 0; i < accesses; ++i) {
    if (Layout::column(i) >= width) continue;
    const auto scale = table_at(p.scale, Layout::column(i)), shift = table_at(p.shift, Layout::column(i));
    float values[count];
#pragma unroll
    for (int k = 0; k < count; ++k) values[k] = fmaf((packs[i][k] - mean) * inverse, 1.0f + scale[k], shift[k]);
    round_to(packs[i], values);
    put<aligned>(out + Layout::column(i), packs[i]);
  }
}

template <class Layout>
__global__ __launch_bounds__(Layout::max_threads, Layout::min_blocks) void rms_norm_kernel(
    const __grid_constant__ RmsNormParams p) {
  using T = typename Layout::T;
  constexpr int count = Layout::count, accesses = Layout::accesses;
  constexpr bool aligned = Layout::aligned;
  const int64_t token = Layout::row(), batch = blockIdx.y;
  const int width = (int)p.width;
  if (token >= p.active) return;

  const T* x = row_of<const T>(p.x, batch, token);
  Pack<T, count> packs[accesses];
#pragma unroll
  for (int i = 0; i < accesses; ++i)
    if (Layout::column(i) < width) packs[i] = fetch<count, aligned, Reuse::once>(x + Layout::column(i));
  float squares = 0;
#pragma unroll
  for (int i = 0; i < accesses; ++i)
    if (Layout::column(i) < width)
#pragma unroll
      for (int k = 0; k < count; ++k) squares = fmaf(packs[i][k], packs[i][k], squares);
  const float inverse = rsqrtf(row_sum<Layout>(squares, 0) / (float)width + p.eps);

  T* out = row_of<T>(p.out, batch, token);
  const auto finish = [&](auto weight) {  // of its own type
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      if (Layout::column(i) >= width) continue;
      const auto scale = fetch<count, aligned, Reuse::again>(weight + Layout::column(i));
      float values[count];
#pragma unroll
      for (int k = 0; k < count; ++k) values[k] = packs[i][k] * inverse * scale[k];
      round_to(packs[i], values);
      put<aligned>(out + Layout::column(i), packs[i]);
    }
  };
  with_pointer(p.weight_element, p.weight, finish);
}

// One of q, k, v of a token: blockIdx.y = 3·batch + which.
template <class Layout>
__global__ __launch_bounds__(Layout::max_threads) void qk_norm_rope_store_kernel(
    const __grid_constant__ QkNormRopeStoreParams p) {
  using T = typename Layout::T;
  constexpr int count = Layout::count, accesses = Layout::accesses;
  constexpr bool aligned = Layout::aligned;
  const int64_t token = Layout::row(), batch = blockIdx.y / 3;
  const int which = blockIdx.y % 3, dim = (int)p.dim, width = (int)p.heads * dim;
  if (token >= p.active) return;
  int64_t row = token;
  if (which != 0 && p.slots) row = p.slots[token];
  if (which != 0 && (row < 0 || row >= p.cache_rows)) __trap();

  const T* from = row_of<const T>(which == 0 ? p.q : which == 1 ? p.k : p.v, batch, token);
  Pack<T, count> packs[accesses];
#pragma unroll
  for (int i = 0; i < accesses; ++i)
    if (Layout::column(i) < width) packs[i] = fetch<count, aligned, Reuse::once>(from + Layout::column(i));

  const Heads& target = which == 0 ? p.q_out : which == 1 ? p.k_cache : p.v_cache;
  T* to = static_cast<T*>(target.data) + batch * target.batch_stride + row * target.row_stride;
  if (which == 2) {
#pragma unroll
    for (int i = 0; i < accesses; ++i)
      if (const int column = Layout::column(i); column < width)
        put<aligned>(to + column / dim * target.head_stride + column % dim, packs[i]);
    return;
  }

  float squares = 0;
#pragma unroll
  for (int i = 0; i < accesses; ++i)
    if (Layout::column(i) < width)
#pragma unroll
      for (int k = 0; k < count; ++k) squares = fmaf(packs[i][k], packs[i][k], squares);
  const float inverse = rsqrtf(row_sum<Layout>(squares, 0) / (float)width + p.eps);

  const auto finish = [&](auto weight) {  // of its own type
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      const int column = Layout::column(i), within = column % dim;
      if (column >= width) continue;
      const auto scale = fetch<count, aligned, Reuse::again>(weight + column);
      const auto cos = fetch<count / 2, aligned, Reuse::again>(p.cos + (token * dim + within) / 2);
      const auto sin = fetch<count / 2, aligned, Reuse::again>(p.sin + (token * dim + within) / 2);
      float turned[count];
#pragma unroll
      for (int k = 0; k < count; k += 2) {
        const float even = packs[i][k] * inverse * scale[k], odd = packs[i][k + 1] * inverse * scale[k + 1];
        turned[k] = fmaf(even, cos[k / 2], -(odd * sin[k / 2]));
        turned[k + 1] = fmaf(even, sin[k / 2], odd * cos[k / 2]);
      }
      round_to(packs[i], turned);
      put<aligned>(to + column / dim * target.head_stride + within, packs[i]);
    }
  };
  with_pointer(p.weight_element, which == 0 ? p.q_weight : p.k_weight, finish);
}

template <class W>
__global__ __launch_bounds__(256) void move_rows_kernel(const __grid_constant__ MoveRowsParams p, bool scatter,
                                                        int lane_bits) {
  constexpr int held = 4;
  const int lanes = 1 << lane_bits, lane = threadIdx.x & (lanes - 1);
  const int64_t index = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) >> lane_bits, batch = blockIdx.y;
  if (index >= p.active) return;
  const int64_t row = p.rows[index];
  if (row < 0 || row >= p.all_rows) __trap();
  const auto* from = reinterpret_cast<const W*>(static_cast<const char*>(p.from) + batch * p.from_batch_stride +
                                                (scatter ? index : row) * p.from_row_stride);
  auto* out = reinterpret_cast<W*>(static_cast<char*>(p.out) + batch * p.out_batch_stride +
                                   (scatter ? row : index) * p.out_row_stride);
  const int64_t words = p.row_bytes / (int64_t)sizeof(W);
  for (int64_t first = lane; first < words; first += held * lanes) {
    W word[held];
#pragma unroll
    for (int i = 0; i < held; ++i)
      if (first + i * lanes < words) word[i] = __ldcg(from + first + i * lanes);
#pragma unroll
    for (int i = 0; i < held; ++i)
      if (first + i * lanes < words) __stwb(out + first + i * lanes, word[i]);
  }
}

}  // namespace

void norm_modulate(const NormModulateParams& p, uintptr_t stream) {
  if (!p.batch || !p.active || !p.width) return;
  const Rows other = p.y.data ? p.y : p.x, sum = p.y.data ? p.sum : p.x;
  const int64_t vector = 16 / size_of(p.x.element);
  const bool aligned = p.width % vector == 0 && aligned_rows(p.out) && aligned_rows(p.x) && aligned_rows(other) &&
                       aligned_rows(sum) && aligned_table(p.gate) && aligned_table(p.shift) && aligned_table(p.scale);
  with_type(p.x.element, [&](auto type) {
    with_layout<decltype(type), 1>("norm_modulate", aligned, p.width, [&](auto layout) {
      using Layout = decltype(layout);
      launch("norm_modulate", norm_modulate_kernel<Layout>, Layout::grid(p.active, p.batch, p.width), stream, p);
    });
  });
}

void rms_norm(const RmsNormParams& p, uintptr_t stream) {
  if (!p.batch || !p.active || !p.width) return;
  const int64_t vector = 16 / size_of(p.x.element);
  const bool aligned = p.width % vector == 0 && aligned_rows(p.out) && aligned_rows(p.x) && aligned16(p.weight);
  with_type(p.x.element, [&](auto type) {
    with_layout<decltype(type), 1>("rms_norm", aligned, p.width, [&](auto layout) {
      using Layout = decltype(layout);
      launch("rms_norm", rms_norm_kernel<Layout>, Layout::grid(p.active, p.batch, p.width), stream, p);
    });
  });
}

void qk_norm_rope_store(const QkNormRopeStoreParams& p, uintptr_t stream) {
  const int64_t width = p.heads * p.dim, size = size_of(p.q.element);
  if (!p.batch || !p.active || !width) return;
  const bool aligned = p.dim % (16 / size) == 0 && aligned_rows(p.q) && aligned_rows(p.k) && aligned_rows(p.v) &&
                       aligned_heads(p.q_out, size) && aligned_heads(p.k_cache, size) &&
                       aligned_heads(p.v_cache, size) && aligned16(p.q_weight) && aligned16(p.k_weight) &&
                       aligned16(p.cos) && aligned16(p.sin);
  with_type(p.q.element, [&](auto type) {
    with_layout<decltype(type), 2>("qk_norm_rope_store", aligned, width, [&](auto layout) {
      using Layout = decltype(layout);
      launch("qk_norm_rope_store", qk_norm_rope_store_kernel<Layout>, Layout::grid(p.active, 3 * p.batch, width),
             stream, p);
    });
  });
}

void move_rows(const MoveRowsParams& p, bool scatter, uintptr_t stream) {
  if (!p.batch || !p.active || !p.row_bytes) return;
  const uint64_t places = reinterpret_cast<uintptr_t>(p.out) | reinterpret_cast<uintptr_t>(p.from) | p.row_bytes |
                          p.out_batch_stride | p.out_row_stride | p.from_batch_stride | p.from_row_stride;
  const auto run = [&](auto word) {
    using W = decltype(word);
    int lane_bits = 0;
    while (lane_bits < 5 && ((int64_t)sizeof(W) << lane_bits) < p.row_bytes) ++lane_bits;
    constexpr int threads = 256;
    launch("move_rows", move_rows_kernel<W>, {(p.active * (1 << lane_bits) + threads - 1) / threads, p.batch, threads},
           stream, p, scatter, lane_bits);
  };
  if (places % 16 == 0) return run(uint4{});
  if (places % 4 == 0) return run(uint32_t{});
  if (places % 2 == 0) return run(uint16_t{});
  run(uint8_t{});
}

}  // namespace dsa_rt::cuda
