// active_attention, written once over a vector type V (attention_float32.h says what that is): a translation unit
// defines V for its instruction set and exports attention_kernel<V, element>.
//
// Softmax(q·Kᵀ/√D)·V for A queries and N keys: per head 4·A·N·D operations, A·N exponentials and, in bf16,
// 4·(N + A)·D bytes. Arithmetic bounds it from a few dozen queries on. With bf16 dot products (Zen 5: two a cycle, of
// 16 lanes and 2 products each) the two matrix products take D / 2 cycles for 16 scores and the softmax, which shares
// their ports, about 4: the floor is 36 cycles at D = 64 and 68 at D = 128. Reached on one core at 4.1 GHz: 38 and 72,
// which is 440 and 470 GFLOP/s.
//
// Work goes in tiles of 48 queries. A thread takes a run of tiles of one head and walks the keys in blocks of 256:
//   pack     Kᵀ in panels (keys along lanes) and V in panels (channels along lanes), once for the whole run; it costs
//            about as much as five queries
//   score    for each tile S = Q·Kᵀ in fp32, 6 rows × one panel in registers, with the largest score of each row
//   weigh    P = exp2((S - m)·c) over S in its place, as packed operands; by how much sums and outputs shrink
//            With K and V in E4M3 a score is multiplied by its key's scale as it is made, and a weight by its value's
//            scale before it is packed: E4M3 is exact in every packed type, so nothing else is rounded than without.
//   gather   O = O·shrink + P·V, 6 rows × one panel in registers
// The run's queries, sums and outputs stay in scratch that fits L2; a panel stays in L1 for all rows of a tile. Tiles
// do not cross from one segment into the next, nor blocks of keys from one range into the next.
//
// Every row goes through the same instructions in the same order wherever it stands: rows of a register block do not
// meet, and missing ones are padded. So its result depends on its own query and on K and V of its own ranges alone.
#pragma once

#include <math.h>

#include "attention.h"
#include "bfloat16.h"
#include "float16.h"
#include "float8.h"
#include "multiply.h"

namespace dsa_rt::cpu {
namespace {

constexpr int64_t tile_rows = attention_tile_rows;
constexpr int64_t key_block = 256;
constexpr int64_t run_bytes = 512 << 10;  // of a run's queries and outputs, half of a common L2

static_assert(tile_rows % block_rows == 0 && tile_rows % 16 == 0);

constexpr int64_t up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Sizes for a head dimension, and the pieces of a thread's scratch.
template <class V>
struct Work {
  using Unit = typename V::Unit;
  static constexpr int64_t width = V::columns * V::lanes;  // of a panel

  int64_t dim, steps, out_width, run_tiles;
  Unit *queries, *keys, *values;    // [run rows][steps], key panels [steps][width], value panels [key pairs][≤ width]
  float *out, *sum, *maximum;       // [run rows][out_width], [run rows][lanes], [run rows]
  float *scores;                    // [tile_rows][key_block]; weights in their place
  float *block_maximum;             // [tile_rows][lanes]
  float *top, *shift, *shrink;      // [tile_rows]: this block's maximum, what to subtract, what to scale sums by
  float *key_scale, *value_scale;   // [key_block], of K and V in E4M3
  float *mask;                      // [width]: 0 for keys, -inf for padding
  size_t bytes;

  Work(void* scratch, int64_t head_dim) : dim(head_dim) {
    steps = up(dim, V::group) / V::group;
    out_width = up(dim, V::lanes);
    const int64_t row_bytes = 4 * (steps + out_width + V::lanes + 1);
    run_tiles = run_bytes / (row_bytes * tile_rows);
    if (run_tiles < 1) run_tiles = 1;
    const int64_t rows = run_tiles * tile_rows;
    char* next = static_cast<char*>(scratch);
    bytes = 0;
    const auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<decltype(pointer + 0)>(next ? next + bytes : nullptr);
      bytes += static_cast<size_t>(up(count * 4, 64));
    };
    take(queries, rows * steps);
    take(keys, key_block * steps);
    take(values, key_block / V::group * out_width);
    take(out, rows * out_width);
    take(sum, rows * V::lanes);
    take(maximum, rows);
    take(scores, tile_rows * key_block);
    take(block_maximum, tile_rows * V::lanes);
    take(top, tile_rows);
    take(shift, tile_rows);
    take(shrink, tile_rows);
    take(key_scale, key_block);
    take(value_scale, key_block);
    take(mask, width);
  }
};

template <class T>
T* row_of(const Heads& heads, int64_t batch, int64_t head, int64_t row) {
  return static_cast<T*>(heads.data) + batch * heads.batch_stride + row * heads.row_stride + head * heads.head_stride;
}

// Scores of a tile's rows with a block of keys, and their maxima, lane by lane.
template <class V, bool scaled>
void score(const Work<V>& w, const typename V::Unit* queries, int64_t rows, int64_t keys) {
  constexpr int columns = V::columns;
  for (int64_t first = 0; first < keys; first += w.width) {
    const bool partial = keys - first < w.width;
    for (int64_t row = 0; row < rows; row += block_rows) {
      typename V::Vec total[block_rows][columns] = {};
      multiply<V>(total, queries + row * w.steps, w.steps, w.keys + first * w.steps, w.steps);
#pragma GCC unroll 8
      for (int r = 0; r < block_rows; ++r) {
        float* to = w.scores + (row + r) * key_block + first;
        float* top = w.block_maximum + (row + r) * V::lanes;
        if constexpr (scaled)
#pragma GCC unroll 8
          for (int c = 0; c < columns; ++c) total[r][c] = total[r][c] * V::load(w.key_scale + first + c * V::lanes);
        if (partial)
#pragma GCC unroll 8
          for (int c = 0; c < columns; ++c) total[r][c] = total[r][c] + V::load(w.mask + c * V::lanes);
        typename V::Vec most = first ? V::load(top) : total[r][0];
#pragma GCC unroll 8
        for (int c = 0; c < columns; ++c) {
          V::store(to + c * V::lanes, total[r][c]);
          most = V::max(most, total[r][c]);
        }
        V::store(top, most);
      }
    }
  }
}

// Scores to weights exp2((score - shift)·scale), shift the largest score so far, whose weight is exactly 1. If that is
// -inf, 0 is taken, or a difference would be NaN: the weights are 0. NaN and +inf scores make a row NaN, as defined.
template <class V, bool scaled>
void weigh(const Work<V>& w, float* maximum, float* sum, int64_t rows, int64_t keys, float scale) {
  const auto factor = V::all(scale);
  for (int64_t r = 0; r < rows; ++r) w.top[r] = V::largest(V::load(w.block_maximum + r * V::lanes));
  for (int64_t r = 0; r < rows; r += V::lanes) {
    const auto before = V::load(maximum + r);
    const auto now = V::max(before, V::load(w.top + r));
    const auto shift = V::finite_or_zero(now);
    V::store(maximum + r, now);
    V::store(w.shift + r, shift);
    V::store(w.shrink + r, V::exp2((before - shift) * factor));
  }
  const int64_t padded = up(keys, w.width);
  for (int64_t r = 0; r < rows; ++r) {
    float* row = w.scores + r * key_block;
    auto* weights = reinterpret_cast<typename V::Unit*>(row);
    const auto shift = V::all(w.shift[r]);
    auto even = V::load(sum + r * V::lanes) * V::all(w.shrink[r]), odd = V::all(0.0f);
#pragma GCC unroll 1  // GCC 12 unrolls it otherwise, which makes attention with bf16 dot products 6% slower
    for (int64_t i = 0; i < padded; i += 2 * V::lanes) {
      const auto a = V::exp2((V::load(row + i) - shift) * factor);
      const auto b = V::exp2((V::load(row + i + V::lanes) - shift) * factor);
      even = even + a;
      odd = odd + b;
      if constexpr (scaled)
        V::store_weights(weights + i / V::group, a * V::load(w.value_scale + i),
                         b * V::load(w.value_scale + i + V::lanes));
      else
        V::store_weights(weights + i / V::group, a, b);
    }
    V::store(sum + r * V::lanes, even + odd);
  }
}

// out = out·shrink + weights·values for the panel of channels at `first`, which has `wanted` vectors.
template <class V, int columns = V::columns>
void gather(const Work<V>& w, float* out, int64_t rows, int64_t keys, int64_t first, int64_t wanted) {
  if constexpr (columns > 1)
    if (wanted < columns) return gather<V, columns - 1>(w, out, rows, keys, first, wanted);
  const auto* values = w.values + first * (key_block / V::group);
  for (int64_t row = 0; row < rows; row += block_rows) {
    float* to = out + row * w.out_width + first;
    const auto* weights = reinterpret_cast<const typename V::Unit*>(w.scores + row * key_block);
    typename V::Vec total[block_rows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < block_rows; ++r) {
      const auto shrink = V::all(w.shrink[row + r]);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) total[r][c] = V::load(to + r * w.out_width + c * V::lanes) * shrink;
    }
    multiply<V>(total, weights, key_block, values, (keys + V::group - 1) / V::group);
#pragma GCC unroll 8
    for (int r = 0; r < block_rows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) V::store(to + r * w.out_width + c * V::lanes, total[r][c]);
  }
}

// The scales of `keys` rows of a head; up to the end of a panel the last one is repeated, as keys are.
inline void take_scales(float* to, const Scales& scales, int64_t batch, int64_t head, int64_t row, int64_t keys,
                        int64_t padded) {
  const float* from = scales.data + batch * scales.batch_stride + row * scales.row_stride + head;
  for (int64_t i = 0; i < keys; ++i) to[i] = from[i * scales.row_stride];
  for (int64_t i = keys; i < padded; ++i) to[i] = to[keys - 1];
}

// Queries [first, first + rows) of one head, all of one segment; K and V have elements of type S.
template <class V, class T, class S>
void attend(const ScaledAttentionParams& p, const Work<V>& w, const AttentionSegment& segment, int64_t batch, int64_t head,
            int64_t first, int64_t rows) {
  const int64_t padded = up(rows, tile_rows);
  V::pack_rows(w.queries, row_of<const T>(p.q, batch, head, first), p.q.row_stride, rows, w.dim);
  memset(w.queries + rows * w.steps, 0, static_cast<size_t>((padded - rows) * w.steps) * 4);
  memset(w.out, 0, static_cast<size_t>(padded * w.out_width) * 4);
  memset(w.sum, 0, static_cast<size_t>(padded * V::lanes) * 4);
  for (int64_t r = 0; r < padded; ++r) w.maximum[r] = -INFINITY;

  const double scale = 1.0 / sqrt(static_cast<double>(p.dim));
  const float scale_log2 = static_cast<float>(1.4426950408889634 * scale);  // log2(e)/√D
  constexpr bool scaled = sizeof(S) == 1;
  const auto use_keys = [&](int64_t key, int64_t keys) {
    const S* k = row_of<const S>(p.k, batch, head, key);
    const S* v = row_of<const S>(p.v, batch, head, key);
    if constexpr (scaled) {
      take_scales(w.key_scale, p.k_scale, batch, head, key, keys, up(keys, w.width));
      take_scales(w.value_scale, p.v_scale, batch, head, key, keys, up(keys, w.width));
    }
    for (int64_t i = 0; i < keys; i += w.width)
      V::pack_keys(w.keys + i * w.steps, k + i * p.k.row_stride, p.k.row_stride, least(w.width, keys - i), w.dim);
    for (int64_t c = 0; c < w.out_width; c += w.width)
      V::pack_values(w.values + c * (key_block / V::group), v + c, p.v.row_stride, keys,
                     least(w.width, w.out_width - c), w.dim - c);
    for (int64_t i = 0, valid = (keys - 1) % w.width + 1; i < w.width; ++i) w.mask[i] = i < valid ? 0.0f : -INFINITY;
    for (int64_t tile = 0; tile < rows; tile += tile_rows) {
      const int64_t count = up(least(tile_rows, rows - tile), block_rows);
      score<V, scaled>(w, w.queries + tile * w.steps, count, keys);
      weigh<V, scaled>(w, w.maximum + tile, w.sum + tile * V::lanes, count, keys, scale_log2);
      for (int64_t c = 0; c < w.out_width; c += w.width)
        gather<V>(w, w.out + tile * w.out_width, count, keys, c, (w.out_width - c) / V::lanes);
    }
  };
  for (int range = 0; range < 2; ++range)
    for (int64_t key = segment.begin[range]; key < segment.end[range]; key += key_block)
      use_keys(key, least(key_block, segment.end[range] - key));
  for (int64_t r = 0; r < rows; ++r) {
    float total = 0.0f;
    for (int l = 0; l < V::lanes; ++l) total += w.sum[r * V::lanes + l];
    const float factor = 1.0f / total;
    float* out = w.out + r * w.out_width;
    for (int64_t d = 0; d < w.dim; ++d) out[d] *= factor;
    store_row(row_of<T>(p.out, batch, head, first + r), out, w.dim);
    if (p.lse)
      p.lse[batch * p.lse_batch_stride + head * p.lse_head_stride + first + r] =
          static_cast<float>(scale * w.maximum[r] + log(static_cast<double>(total)));
  }
}

template <class V, class T, class S>
void run(const ScaledAttentionParams& p, void* scratch, int64_t begin, int64_t end) {
  const Work<V> work(scratch, p.dim);
  const AttentionSegment whole = {p.active, {0, 0}, {p.rows, 0}};
  const AttentionSegment* segments = p.segments ? p.segments : &whole;
  const int64_t tiles = attention_tiles(p);
  while (begin < end) {
    const int64_t head = begin / tiles;
    int64_t first = begin % tiles, query = 0;
    const AttentionSegment* segment = segments;
    for (; first >= attention_tiles(segment->queries); ++segment) {
      first -= attention_tiles(segment->queries);
      query += segment->queries;
    }
    const int64_t count = least(least(end - begin, attention_tiles(segment->queries) - first), work.run_tiles);
    const int64_t row = first * tile_rows;
    attend<V, T, S>(p, work, *segment, head / p.heads, head % p.heads, query + row,
                    least(count * tile_rows, segment->queries - row));
    begin += count;
  }
}

template <class V>
size_t scratch_bytes(int64_t dim) {
  return Work<V>(nullptr, dim).bytes;
}

template <class V, class T, class S = T>
constexpr AttentionKernel attention_kernel = {scratch_bytes<V>, run<V, T, S>};

}  // namespace
}  // namespace dsa_rt::cpu
