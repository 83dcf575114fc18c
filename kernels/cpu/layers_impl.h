// The transformer ops beside attention, written once over Lanes and compiled once per instruction set: a translation
// unit includes this file, has its flags in CMakeLists.txt, and exports `layer_kernels`.
//
// All are bound by memory once their rows leave the cache. Bytes per row of C elements of s bytes: norm_modulate and
// rms_norm read and write s·C each, the residual adds two reads (x, y) and a write (the sum) less the read of the norm;
// qk_norm_rope_store reads 3·s·C and writes as much; confidence_pool reads 2·s·C and does 2·H·C operations. Tables,
// weights and rotations are fp32 rows that many tokens share. A row that is read again comes from L1: 3 KB in bf16 at
// C = 1536, 10 KB at 5120.
#pragma once

#include <math.h>

#include "elements.h"
#include "layers.h"
#include "move_row.h"
#include "rows.h"

namespace dsa_rt::cpu {
namespace {

template <class T>
T* row_of(const Heads& heads, int64_t batch, int64_t row) {
  return static_cast<T*>(heads.data) + batch * heads.batch_stride + row * heads.row_stride;
}

// out[i] = made(i) by blocks of a row.
template <class T, class Made>
DSA_RT_INLINE void put_row(T* out, bool streams, int64_t width, Made made) {
  if (streams && is_aligned(out))
    for_blocks(width, [&](int64_t i, auto block) { stream(out + i, made(i, block), block); });
  else
    for_blocks(width, [&](int64_t i, auto block) { store(out + i, made(i, block), block); });
}

// Sum of the squares of (x - middle) over a row. Meanwhile the row `next` is fetched: between reading a row and reading
// the next one lie passes over L1, in which memory would have nothing to do.
template <class T>
DSA_RT_INLINE float sum_of_squares(const T* x, const T* next, int64_t width, float middle) {
  const Lanes subtract = all(middle);
  Lanes total = all(0.0f);
  for_blocks(width, [&](int64_t i, auto block) {
    const Lanes distance = load(x + i, block, middle) - subtract;
    total = total + distance * distance;
    fetch(next + i);
  });
  return sum(total);
}

struct Moments {
  float mean, variance;
};

// out = (x - mean) / √(variance + eps)·(1 + scale) + shift. Meanwhile the row `next`, unless it is null, is fetched.
template <class T>
DSA_RT_INLINE void normalise(T* out, bool streams, const T* x, const T* next, const float* shift, const float* scale,
                             Moments of, int64_t width, float eps) {
  const Lanes mean = all(of.mean), factor = all(1.0f / sqrtf(of.variance + eps)), one = all(1.0f);
  put_row(out, streams, width, [&](int64_t i, auto block) {
    if (next) fetch(next + i);
    const Lanes normed = (load(x + i, block) - mean) * factor;
    return normed * (one + load(scale + i, block)) + load(shift + i, block);
  });
}

// to = x + gate·y, or x + y without a gate; `to` may be x itself. Returns the sum of its elements as they were rounded.
template <class T>
DSA_RT_INLINE float add_row(T* to, const T* x, const T* y, const float* gate, int64_t width) {
  Lanes total = all(0.0f);
  const auto add = [&](auto product) {
    for_blocks(width, [&](int64_t i, auto block) {
      const Lanes made = rounded<T>(load(x + i, block) + product(i, block));
      total = total + made;
      store_rounded(to + i, made, block);
    });
  };
  if (gate)
    add([&](int64_t i, auto block) { return load(gate + i, block) * load(y + i, block); });
  else
    add([&](int64_t i, auto block) { return load(y + i, block); });
  return sum(total);
}

template <class T>
DSA_RT_INLINE float sum_row(const T* x, int64_t width) {
  Lanes total = all(0.0f);
  for_blocks(width, [&](int64_t i, auto block) { total = total + load(x + i, block); });
  return sum(total);
}

// The mean is known; `next` is fetched.
template <class T>
DSA_RT_INLINE Moments moments_about(float mean, const T* x, const T* next, int64_t width) {
  return {mean, sum_of_squares(x, next, width, mean) / static_cast<float>(width)};
}

// Both in one pass, about the mean of four elements: Σd² - (Σd)²/C loses nothing where that is near the mean of the row,
// within two standard deviations. Where it is not, there are two passes.
template <class T>
DSA_RT_INLINE Moments moments(const T* x, const T* next, int64_t width) {
  const float pivot = 0.25f * (load(x) + load(x + width / 4) + load(x + width / 2) + load(x + width / 4 * 3));
  const Lanes subtract = all(pivot);
  Lanes total = all(0.0f), squares = all(0.0f);
  for_blocks(width, [&](int64_t i, auto block) {
    const Lanes distance = load(x + i, block, pivot) - subtract;
    total = total + distance;
    squares = squares + distance * distance;
    fetch(next + i);
  });
  const float count = static_cast<float>(width), away = sum(total) / count, variance = sum(squares) / count - away * away;
  if (away * away <= 4.0f * variance) return {pivot + away, variance};
  return moments_about(sum_row(x, width) / count, x, next, width);
}

void norm_modulate(const NormModulateParams& p, int64_t begin, int64_t end) {
  with_type(p.x.element, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / p.active, token = i % p.active;
      const int64_t row = p.table_rows ? p.table_rows[token] : 0;
      const auto table = [&](const Modulation& m) { return m.data + batch * m.batch_stride + row * m.row_stride; };
      const auto next = [&](const Rows& rows) { return flat_row<const T>(rows, p.active, i + 1 < end ? i + 1 : i); };
      const T* x = row_of<const T>(p.x, batch, token);
      Moments of;
      if (p.sum.data) {
        T* to = row_of<T>(p.sum, batch, token);
        const float total =
            add_row(to, x, row_of<const T>(p.y, batch, token), p.gate.data ? table(p.gate) : nullptr, p.width);
        of = moments_about(total / static_cast<float>(p.width), to, next(p.x), p.width);
        x = to;
      } else {
        of = moments(x, next(p.x), p.width);
      }
      normalise(row_of<T>(p.out, batch, token), p.streams, x, p.sum.data ? next(p.y) : nullptr, table(p.shift),
                table(p.scale), of, p.width, p.eps);
    }
  });
  streams_end();
}

// 1 / √(mean of squares + eps)
template <class T>
DSA_RT_INLINE float rms_factor(const T* x, const T* next, int64_t width, float eps) {
  return 1.0f / sqrtf(sum_of_squares(x, next, width, 0.0f) / static_cast<float>(width) + eps);
}

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  with_type(p.x.element, [&](auto type) {
    using T = decltype(type);
    with_type(p.weight_element, [&](auto weight_type) {
      const auto* weight = static_cast<const decltype(weight_type)*>(p.weight);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / p.active, token = i % p.active;
        const T* x = row_of<const T>(p.x, batch, token);
        const T* next = flat_row<const T>(p.x, p.active, i + 1 < end ? i + 1 : i);
        const Lanes factor = all(rms_factor(x, next, p.width, p.eps));
        put_row(row_of<T>(p.out, batch, token), p.streams, p.width, [&](int64_t c, auto block) {
          return load(x + c, block) * factor * load(weight + c, block);
        });
      }
    });
  });
  streams_end();
}

// A token's rotation laid out for elements in their order: (even, odd)·cos + (odd, even)·(-sin, sin).
struct Rotation {
  static constexpr int64_t width = 256;  // elements of a head that are turned at once
  alignas(64) float cos[width], sin[width];

  void set(const float* from_cos, const float* from_sin, int64_t pairs) {
    for (int64_t i = 0; i < pairs; ++i) {
      cos[2 * i] = cos[2 * i + 1] = from_cos[i];
      sin[2 * i] = -from_sin[i];
      sin[2 * i + 1] = from_sin[i];
    }
  }
};

// Elements [first, first + count) of every head of a row: x·factor·weight, turned.
template <class T, class W>
DSA_RT_INLINE void turn_heads(T* out, bool streams, int64_t head_stride, const T* x, const W* weight, float factor,
                              const Rotation& rotation, int64_t heads, int64_t dim, int64_t first, int64_t count) {
  const Lanes scale = all(factor);
  for (int64_t head = 0; head < heads; ++head)
    put_row(out + head * head_stride + first, streams, count, [&](int64_t i, auto block) {
      const int64_t at = head * dim + first + i;
      const Lanes normed = load(x + at, block) * scale * load(weight + at, block);
      return normed * load(rotation.cos + i, block) + swap_pairs(normed) * load(rotation.sin + i, block);
    });
}

void qk_norm_rope_store(const QkNormRopeStoreParams& p, int64_t begin, int64_t end) {
  const int64_t width = p.heads * p.dim;
  with_type(p.q.element, [&](auto type) {
    using T = decltype(type);
    with_type(p.weight_element, [&](auto weight_type) {
      using W = decltype(weight_type);
      Rotation rotation;
      for (int64_t i = begin; i < end; ++i) {
        const int64_t batch = i / p.active, token = i % p.active;
        const int64_t slot = p.slots ? p.slots[token] : token;
        const T *q = row_of<const T>(p.q, batch, token), *k = row_of<const T>(p.k, batch, token);
        const auto next = [&](const Rows& rows) { return flat_row<const T>(rows, p.active, i + 1 < end ? i + 1 : i); };
        const float q_factor = rms_factor(q, next(p.q), width, p.eps), k_factor = rms_factor(k, next(p.k), width, p.eps);
        for (int64_t first = 0; first < p.dim; first += Rotation::width) {
          const int64_t count = p.dim - first < Rotation::width ? p.dim - first : Rotation::width;
          const int64_t pair = (token * p.dim + first) / 2;
          rotation.set(p.cos + pair, p.sin + pair, count / 2);
          turn_heads(row_of<T>(p.q_out, batch, token), p.streams, p.q_out.head_stride, q, static_cast<const W*>(p.q_weight),
                     q_factor, rotation, p.heads, p.dim, first, count);
          turn_heads(row_of<T>(p.k_cache, batch, slot), p.streams, p.k_cache.head_stride, k, static_cast<const W*>(p.k_weight),
                     k_factor, rotation, p.heads, p.dim, first, count);
        }
        const T* v = row_of<const T>(p.v, batch, token);
        T* kept = row_of<T>(p.v_cache, batch, slot);
        const int64_t runs = p.v_cache.head_stride == p.dim ? 1 : p.heads;
        for (int64_t run = 0; run < runs; ++run)
          move_row(kept + run * p.v_cache.head_stride, v + run * p.dim, next(p.v) + run * p.dim,
                   width / runs * static_cast<int64_t>(sizeof(T)), p.streams);
      }
    });
  });
  streams_end();
}

// query·weight / √D: what the scores need of both, and they need it for every token.
void pool_query(const ConfidencePoolParams& p, float* query) {
  const Lanes scale = all(static_cast<float>(1.0 / sqrt(static_cast<double>(p.dim))));
  with_type(p.weight_element, [&](auto weight_type) {
    const auto* weight = static_cast<const decltype(weight_type)*>(p.key_weight);
    for_blocks(p.heads * p.dim, [&](int64_t i, auto block) {
      store(query + i, load(p.query + i, block) * load(weight + i, block) * scale, block);
    });
  });
}

// The factor of a key's norm stands before the sum over its channels, so that one pass makes both.
void pool_scores(const ConfidencePoolParams& p, const float* query, float* scores, int64_t begin, int64_t end) {
  const int64_t width = p.heads * p.dim;
  with_type(p.keys.element, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = begin; i < end; ++i) {
      const T* key = flat_row<const T>(p.keys, p.active, i);
      const T* next = flat_row<const T>(p.keys, p.active, i + 1 < end ? i + 1 : i);
      float* score = scores + i / p.active * p.heads * p.active + i % p.active;
      Lanes squares = all(0.0f);
      for (int64_t head = 0; head < p.heads; ++head) {
        Lanes total = all(0.0f), own = all(0.0f);  // of this head: chains of additions that do not wait for each other
        for_blocks(p.dim, [&](int64_t d, auto block) {
          const int64_t at = head * p.dim + d;
          const Lanes value = load(key + at, block);
          fetch(next + at);
          total = multiply_add(load(query + at, block), value, total);
          own = multiply_add(value, value, own);
        });
        squares = squares + own;
        score[head * p.active] = sum(total);
      }
      const float factor = 1.0f / sqrtf(sum(squares) / static_cast<float>(width) + p.eps);
      for (int64_t head = 0; head < p.heads; ++head) score[head * p.active] *= factor;
    }
  });
}

// Softmax in place. A NaN score, one of +inf or none above -inf makes all weights NaN, as defined.
void pool_weights(const ConfidencePoolParams& p, float* scores, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    float* row = scores + i * p.active;
    Lanes most = all(-INFINITY), total = all(0.0f);
    for_blocks(p.active, [&](int64_t a, auto block) { most = larger(load(row + a, block, -INFINITY), most); });
    const Lanes top = all(largest(most)), log2_e = all(1.4426950408889634f);
    for_blocks(p.active, [&](int64_t a, auto block) {
      const Lanes weight = exp2((load(row + a, block, -INFINITY) - top) * log2_e);
      total = total + weight;
      store(row + a, weight, block);
    });
    const Lanes factor = all(1.0f / sum(total));
    for_blocks(p.active, [&](int64_t a, auto block) { store(row + a, load(row + a, block) * factor, block); });
  }
}

// Tokens are summed 128 at a time, then those sums: rounding errors grow with the length of a sum. Where tokens lie pages
// apart and one pass takes all heads, 32: the processor looks up some dozens of pages at once, and those of the next tokens
// are among them. With more passes the sums of all heads would be read and written too often.
constexpr int64_t pool_tokens_together = 128, pool_far_tokens_together = 32, pool_far = 2048;  // bytes
// Channels and heads at a time: two vectors for each of as many heads as the registers hold.
constexpr int pool_column = 2 * vector_floats, pool_heads_together = vector_floats == 16 ? 12 : 6;

// out[head, channel] of `count` heads over `length` tokens, pool_column channels of each: their sum is added, or set.
// Meanwhile the `ahead` tokens after those are fetched.
template <int count, class T>
DSA_RT_INLINE void add_tokens(float* out, int64_t width, const float* weights, int64_t active, const T* tokens,
                              int64_t stride, int64_t length, int64_t ahead, bool set) {
  Floats low[count], high[count];
#pragma GCC unroll 12
  for (int h = 0; h < count; ++h) low[h] = high[h] = Floats{};
  for (int64_t a = 0; a < length; ++a) {
    const T* token = tokens + a * stride;
    const Floats first = load_vector(token), second = load_vector(token + vector_floats);
    if (a < ahead) fetch<pool_column>(token + length * stride);
#pragma GCC unroll 12
    for (int h = 0; h < count; ++h) {
      const Floats weight = all_of(weights[h * active + a]);
      low[h] = multiply_add(weight, first, low[h]);
      high[h] = multiply_add(weight, second, high[h]);
    }
  }
#pragma GCC unroll 12
  for (int h = 0; h < count; ++h) {
    float* to = out + h * width;
    if (!set) {
      low[h] = load_vector(to) + low[h];
      high[h] = load_vector(to + vector_floats) + high[h];
    }
    memcpy(to, &low[h], sizeof(Floats));
    memcpy(to + vector_floats, &high[h], sizeof(Floats));
  }
}

// Calls body(a constant n) for n of 1 to `most`.
template <int most, class Body>
DSA_RT_INLINE void with_count(int64_t n, Body body) {
  if constexpr (most > 1)
    if (n < most) return with_count<most - 1>(n, body);
  body(std::integral_constant<int, most>{});
}

// The tokens of a piece that are summed together fit L2, and each of their lines is read once for as many heads as there
// are registers: no copy of them has to be laid out for L1, where they, a few KB apart, would share few sets.
void pool_tokens(const ConfidencePoolParams& p, const float* weights, int64_t begin, int64_t end) {
  const int64_t width = p.heads * p.dim, pieces = pool_pieces(width);
  const int64_t passes = (p.heads + pool_heads_together - 1) / pool_heads_together;
  const int64_t group = (p.heads + passes - 1) / passes;  // 40 heads are 4 times 10, not 12, 12, 12 and 4
  with_type(p.tokens.element, [&](auto type) {
    using T = decltype(type);
    const bool far = p.tokens.row_stride * static_cast<int64_t>(sizeof(T)) >= pool_far && passes == 1;
    const int64_t together = far ? pool_far_tokens_together : pool_tokens_together;
    T rest[pool_tokens_together * pool_column];  // the last channels, where they are no whole column
    float sums[pool_heads_together * pool_column];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / pieces, start = i % pieces * pool_channels;
      const int64_t channels = width - start < pool_channels ? width - start : pool_channels;
      for (int64_t first = 0; first < p.active; first += together) {
        const int64_t left = p.active - first, length = left < together ? left : together;
        for (int64_t c = 0; c < channels; c += pool_column) {
          const T* tokens = row_of<const T>(p.tokens, batch, first) + start + c;
          const int64_t some = channels - c < pool_column ? channels - c : 0;
          if (some)
            for (int64_t a = 0; a < length; ++a)
              for (int64_t k = 0; k < pool_column; ++k)
                rest[a * pool_column + k] = k < some ? tokens[a * p.tokens.row_stride + k] : T{};
          for (int64_t head = 0; head < p.heads; head += group) {
            const int64_t row = batch * p.heads + head, heads = p.heads - head < group ? p.heads - head : group;
            const float* weight = weights + row * p.active + first;
            float* out = p.out + row * width + start + c;
            with_count<pool_heads_together>(heads, [&](auto count) {
              if (some)
                add_tokens<count.value>(sums, pool_column, weight, p.active, rest, pool_column, length, 0, true);
              else
                add_tokens<count.value>(out, width, weight, p.active, tokens, p.tokens.row_stride, length,
                                        head ? 0 : left - length, first == 0);
            });
            for (int64_t h = 0; some && h < heads; ++h)
              for (int64_t k = 0; k < some; ++k)
                out[h * width + k] = (first ? out[h * width + k] : 0.0f) + sums[h * pool_column + k];
          }
        }
      }
    }
  });
}

constexpr LayerKernels layer_kernels = {norm_modulate, rms_norm,     qk_norm_rope_store, pool_query,
                                        pool_scores,   pool_weights, pool_tokens};

}  // namespace
}  // namespace dsa_rt::cpu
