// The step family, written once in plain loops that compilers vectorise, compiled once per instruction set: a
// translation unit includes this file, has its flags in CMakeLists.txt, and exports `kernels`.
//
// Bytes per row of P elements (x of s bytes, velocity of t): cached_step reads and writes s·P, reads t·P, and writes
// t·P for fresh rows; renoise reads (s + t)·P and writes s·P, twice with x0. Both are bound by memory once rows leave
// the cache; the noise costs about 1.1 ns an element with AVX-512 on one core (Zen 5), 2.3 with AVX2, 3.5 with SSE2.
#pragma once

#include "../philox.h"
#include "rows.h"
#include "step.h"

namespace dsa_rt::cpu {
namespace {

// Calls body(type of x, type of velocity) for the element types of the two.
template <class Body>
void with_types(Element x, Element velocity, Body body) {
  const bool wide_velocity = velocity == Element::float32;
  if (x == Element::float32)
    wide_velocity ? body(float{}, float{}) : body(float{}, BFloat16{});
  else
    wide_velocity ? body(BFloat16{}, float{}) : body(BFloat16{}, BFloat16{});
}

constexpr int tile_blocks = 256;

// Normals of many (row, block) pairs at once: short rows would leave vector lanes empty.
struct NoiseTile {
  uint32_t block[tile_blocks], token_low[tile_blocks], token_high[tile_blocks];
  float normals[4 * tile_blocks];

  void generate(int count, uint32_t draw, uint64_t seed) {
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
  with_types(p.out.element, Element::float32, [&](auto type, auto) {
    using T = decltype(type);
    for_each_noise(p.seeds, p.tokens, p.rows, p.width, p.draw, begin, end,
                   [&](int64_t batch, int64_t row, int64_t first, int64_t count, const float* normals) {
                     T* out = row_of<T>(p.out, batch, row) + first;
                     for (int64_t i = 0; i < count; ++i) store(out + i, normals[i]);
                   });
  });
}

// out may be x or velocity itself: every element is read before it is written, and `ivdep` says just that.
template <class X, class V>
void renoise_piece(const RenoiseParams& p, X* out, X* x0, const X* x, const V* velocity, const float* normals, int64_t count) {
  const float sigma = p.sigma, keep = p.keep, sigma_next = p.sigma_next;
  if (x0) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      const float clean = load(x + i) - sigma * load(velocity + i);
      store(x0 + i, clean);
      store(out + i, normals ? keep * clean + sigma_next * normals[i] : clean);
    }
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) {
      const float clean = load(x + i) - sigma * load(velocity + i);
      store(out + i, normals ? keep * clean + sigma_next * normals[i] : clean);
    }
  }
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

// ‖fresh - cached‖₁ / ‖fresh‖₁ over sixteen fixed lanes: the same order of additions for every instruction set.
template <class V>
float relative_change(const V* fresh, const V* cached, int64_t width) {
  constexpr int lanes = 16;
  float change[lanes] = {}, norm[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= width; i += lanes)
    for (int l = 0; l < lanes; ++l) {
      const float value = load(fresh + i + l);
      change[l] += fabsf(value - load(cached + i + l));
      norm[l] += fabsf(value);
    }
  for (int l = 0; i < width; ++i, ++l) {
    const float value = load(fresh + i);
    change[l] += fabsf(value - load(cached + i));
    norm[l] += fabsf(value);
  }
  for (int half = lanes / 2; half; half /= 2)
    for (int l = 0; l < half; ++l) {
      change[l] += change[l + half];
      norm[l] += norm[l + half];
    }
  const float smallest = bits_to_float(0x00800000u);
  return change[0] / (norm[0] < smallest ? smallest : norm[0]);  // a NaN norm stays
}

void cached_step(const CachedStepParams& p, int64_t begin, int64_t end) {
  with_types(p.x.element, p.cache.element, [&](auto x_type, auto velocity_type) {
    using X = decltype(x_type);
    using V = decltype(velocity_type);
    const float delta = p.delta_sigma;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / p.rows, row = i % p.rows;
      X* x = row_of<X>(p.x, batch, row);
      V* cache = row_of<V>(p.cache, batch, row);
      const int32_t index = p.fresh_index[row];
      if (index < 0) {
#pragma GCC ivdep
        for (int64_t k = 0; k < p.width; ++k) store(x + k, load(x + k) + delta * load(cache + k));
        continue;
      }
      const V* fresh = row_of<const V>(p.fresh, batch, index);
      if (p.score) p.score[batch * p.score_stride + index] = relative_change(fresh, cache, p.width);
#pragma GCC ivdep
      for (int64_t k = 0; k < p.width; ++k) {
        cache[k] = fresh[k];
        store(x + k, load(x + k) + delta * load(fresh + k));
      }
    }
  });
}

constexpr StepKernels kernels = {philox_normal, renoise, cached_step};

}  // namespace
}  // namespace dsa_rt::cpu
