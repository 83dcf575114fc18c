// The step family, written once over Lanes, the noise in plain loops that compilers vectorise, and compiled once per
// instruction set: a translation unit includes this file, has its flags in CMakeLists.txt, and exports `kernels`.
//
// Bytes per row of P elements (x of s bytes, velocity of t): cached_step reads and writes s·P, reads t·P, and writes
// t·P for fresh rows; renoise reads (s + t)·P and writes s·P, twice with x0. Both are bound by memory once rows leave
// the cache; the noise costs about 1.1 ns an element with AVX-512 on one core (Zen 5), 2.3 with AVX2, 3.5 with SSE2.
#pragma once

#include "../philox.h"
#include "elements.h"
#include "rows.h"
#include "step.h"

namespace dsa_rt::cpu {
namespace {

// Calls body(type of x, type of velocity) for the element types of the two.
template <class Body>
void with_types(Element x, Element velocity, Body body) {
  with_type(x, [&](auto x_type) { with_type(velocity, [&](auto velocity_type) { body(x_type, velocity_type); }); });
}

constexpr int tile_blocks = 256;

// Normals of many (row, block) pairs at once: short rows would leave vector lanes empty.
struct NoiseTile {
  uint32_t block[tile_blocks], token_low[tile_blocks], token_high[tile_blocks];
  float normals[4 * tile_blocks];

  // Not inline: it would be there once for each pair of element types.
  __attribute__((noinline)) void generate(int count, uint32_t draw, uint64_t seed) {
    for (int i = 0; i < count; ++i) {
      const uint64_t token = token_low[i] | ((uint64_t)token_high[i] << 32);
      const Normals n = philox_normals(block[i], draw, token, seed);
      normals[4 * i] = n.n0;
      normals[4 * i + 1] = n.n1;
      normals[4 * i + 2] = n.n2;
      normals[4 * i + 3] = n.n3;
    }
  }
};

// Walks the rows [begin, end) in tiles and calls use(batch, row, first element, count, normals) for each piece.
template <class Use>
void for_each_noise(const int64_t* seeds, const int64_t* tokens, int64_t rows, int64_t width, uint32_t draw, int64_t begin,
                    int64_t end, Use use) {
  const int64_t blocks = (width + 3) / 4;
  const int64_t tile_width = blocks < tile_blocks ? blocks : tile_blocks;
  const int64_t tile_rows = tile_blocks / (tile_width ? tile_width : 1);
  NoiseTile tile;
  while (begin < end) {
    const int64_t batch = begin / rows, row = begin % rows;
    int64_t count = end - begin < rows - row ? end - begin : rows - row;  // one tile has one seed
    count = count < tile_rows ? count : tile_rows;
    for (int64_t first = 0; first < blocks; first += tile_width) {
      const int64_t pieces = blocks - first < tile_width ? blocks - first : tile_width;
      int filled = 0;
      for (int64_t r = 0; r < count; ++r) {
        const uint64_t token = (uint64_t)tokens[row + r];
        for (int64_t j = 0; j < pieces; ++j, ++filled) {
          tile.block[filled] = (uint32_t)(first + j);
          tile.token_low[filled] = (uint32_t)token;
          tile.token_high[filled] = (uint32_t)(token >> 32);
        }
      }
      tile.generate(filled, draw, (uint64_t)seeds[batch]);
      const int64_t left = width - 4 * first;
      const int64_t elements = left < 4 * pieces ? left : 4 * pieces;
      for (int64_t r = 0; r < count; ++r) use(batch, row + r, 4 * first, elements, tile.normals + 4 * pieces * r);
    }
    begin += count;
  }
}

void philox_normal(const PhiloxNormalParams& p, int64_t begin, int64_t end) {
  with_type(p.out.element, [&](auto type) {
    using T = decltype(type);
    for_each_noise(p.seeds, p.tokens, p.rows, p.width, p.draw, begin, end,
                   [&](int64_t batch, int64_t row, int64_t first, int64_t count, const float* normals) {
                     T* out = row_of<T>(p.out, batch, row) + first;
                     for_blocks(count, [&](int64_t i, auto block) { store(out + i, load(normals + i, block), block); });
                   });
  });
}

// out may be x or velocity itself: a block is read before it is written.
template <class X, class V>
void renoise_piece(const RenoiseParams& p, X* out, X* x0, const X* x, const V* velocity, const float* normals, int64_t count) {
  const Lanes sigma = all(p.sigma), keep = all(p.keep), sigma_next = all(p.sigma_next);
  for_blocks(count, [&](int64_t i, auto block) {
    const Lanes clean = load(x + i, block) - sigma * load(velocity + i, block);
    if (x0) store(x0 + i, clean, block);
    store(out + i, normals ? keep * clean + sigma_next * load(normals + i, block) : clean, block);
  });
}

void renoise(const RenoiseParams& p, int64_t begin, int64_t end) {
  with_types(p.x.element, p.velocity.element, [&](auto x_type, auto velocity_type) {
    using X = decltype(x_type);
    using V = decltype(velocity_type);
    auto piece = [&](int64_t batch, int64_t row, int64_t first, int64_t count, const float* normals) {
      X* x0 = p.x0.data ? row_of<X>(p.x0, batch, row) + first : nullptr;
      renoise_piece(p, row_of<X>(p.out, batch, row) + first, x0, row_of<const X>(p.x, batch, row) + first,
                    row_of<const V>(p.velocity, batch, row) + first, normals, count);
    };
    if (p.sigma_next != 0.0f)
      for_each_noise(p.seeds, p.tokens, p.rows, p.width, p.draw, begin, end, piece);
    else
      for (int64_t i = begin; i < end; ++i) piece(i / p.rows, i % p.rows, 0, p.width, nullptr);
  });
}

// cached = fresh; returns ‖fresh - cached‖₁ / ‖fresh‖₁ of before.
template <class V>
float replace_row(V* cached, const V* fresh, int64_t width) {
  Lanes change = all(0.0f), norm = all(0.0f);
  for_blocks(width, [&](int64_t i, auto block) {
    const Lanes value = load(fresh + i, block);
    change = change + absolute(value - load(cached + i, block));
    norm = norm + absolute(value);
    copy(cached + i, fresh + i, block);
  });
  const float smallest = bits_to_float(0x00800000u), size = sum(norm);
  return sum(change) / (size < smallest ? smallest : size);  // a NaN norm stays
}

// x += delta·velocity
template <class X, class V>
void advance(X* x, const V* velocity, float delta, int64_t count) {
  const Lanes factor = all(delta);
  for_blocks(count, [&](int64_t i, auto block) {
    store(x + i, load(x + i, block) + factor * load(velocity + i, block), block);
  });
}

// A few rows at a time: first the cache takes the fresh ones, then all advance by the velocities, which are in L1. So
// no branch asks of a row whether it is fresh, which for every other row it would guess wrongly half of the time, and
// rows that lie one after another advance as one.
void cached_step(const CachedStepParams& p, int64_t begin, int64_t end) {
  constexpr int64_t together = 1 << 11;  // elements
  const int64_t most = together / (p.width ? p.width : 1) + 1;
  const auto place = [&](int64_t i) { return p.fresh_order ? p.fresh_order[i] : i; };
  with_types(p.x.element, p.cache.element, [&](auto x_type, auto velocity_type) {
    using X = decltype(x_type);
    using V = decltype(velocity_type);
    const bool dense = p.x.row_stride == p.width && p.cache.row_stride == p.width;
    int64_t next = 0;  // of the fresh rows in order
    for (int64_t left = p.active; left > 0;) {  // the first at or behind `begin`
      const int64_t half = left / 2;
      const bool behind = p.fresh_rows[place(next + half)] >= begin % p.rows;
      next = behind ? next : next + half + 1;
      left = behind ? half : left - half - 1;
    }
    for (int64_t i = begin, count; i < end; i += count) {
      const int64_t batch = i / p.rows, row = i % p.rows;
      if (!row) next = 0;
      count = end - i < p.rows - row ? end - i : p.rows - row;
      count = count < most ? count : most;
      for (; next < p.active && p.fresh_rows[place(next)] < row + count; ++next) {
        const int64_t index = place(next);
        V* cached = row_of<V>(p.cache, batch, p.fresh_rows[index]);
        const V* fresh = row_of<const V>(p.fresh, batch, index);
        if (p.score)
          p.score[batch * p.score_stride + index] = replace_row(cached, fresh, p.width);
        else
          memcpy(cached, fresh, static_cast<size_t>(p.width) * sizeof(V));
      }
      const int64_t lines = dense ? 1 : count, width = dense ? count * p.width : p.width;
      for (int64_t line = row; line < row + lines; ++line)
        advance(row_of<X>(p.x, batch, line), row_of<const V>(p.cache, batch, line), p.delta_sigma, width);
    }
  });
}

constexpr StepKernels kernels = {philox_normal, renoise, cached_step};

}  // namespace
}  // namespace dsa_rt::cpu
