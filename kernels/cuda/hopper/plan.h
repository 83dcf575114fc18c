// The plan of a call, made on the host: segments in order, and whether the tail's keys are split.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "../../attention.h"
#include "scheduler.cuh"

namespace dsa_rt::cuda::hopper {

// The plan of checked arguments, at most 8 segments, nothing split: empty ranges and segments dropped, ranges in the
// order of their rows, adjoining ones joined. `tiles` saturates where it exceeds an int.
inline Plan make_plan(const AttentionParams& a) {
  const AttentionSegment all = {a.active, {0, 0}, {a.rows, 0}};
  const AttentionSegment* given = a.segments ? a.segments : &all;
  Plan p = {};
  p.batch = (int)a.batch;
  p.heads = (int)a.heads;
  int first_query = 0;
  for (int64_t i = 0; i < (a.segments ? a.segment_count : 1); ++i) {
    Segment s = {};
    s.first_query = first_query;
    s.queries = (int)given[i].queries;
    s.parts = 1;
    first_query += s.queries;
    if (!s.queries) continue;
    const int order = given[i].begin[1] < given[i].begin[0];
    for (const int range : {order, 1 - order}) {
      const int begin = (int)given[i].begin[range], end = (int)given[i].end[range];
      if (begin >= end) continue;
      if (s.ranges && s.end[s.ranges - 1] == begin) {
        s.end[s.ranges - 1] = end;
      } else {
        s.begin[s.ranges] = begin;
        s.end[s.ranges++] = end;
      }
    }
    p.segments[p.segment_count++] = s;
  }
  std::stable_sort(p.segments, p.segments + p.segment_count,
                   [](const Segment& x, const Segment& y) { return key_tiles(x) > key_tiles(y); });
  int64_t tiles = 0;
  for (int i = 0; i < p.segment_count; ++i) {
    p.segments[i].first_tile = p.segments[i].first_work = (int)std::min<int64_t>(tiles, INT32_MAX);
    tiles += a.batch * a.heads * tiles_of(p.segments[i].queries, tile_queries);
  }
  p.tiles = p.whole = p.works = (int)std::min<int64_t>(tiles, INT32_MAX);
  return p;
}

// Splits the keys of the tail, the tiles from number `whole` on, into parts of at most `length` key tiles.
inline void split_tail(Plan& p, int whole, int length) {
  p.whole = p.works = whole;
  for (int i = 0; i < p.segment_count; ++i) {
    Segment& s = p.segments[i];
    const Tail tail = tail_of(p, i);
    if (tail.count <= 0) continue;  // the segment has no tile in the tail
    if (s.first_tile >= whole) s.first_work = p.works;
    s.parts = tiles_of(key_tiles(s), length);
    p.works += tail.count * s.parts;
  }
}

constexpr int part_least = 8;   // key tiles of a part of the longest segment
constexpr int part_rounds = 2;  // of parts for each block, at most: they bound the scratch

// Estimates, in cycles of a multiprocessor; the notes count them.
constexpr int64_t work_cycles = 4096;  // what no other work hides: filling the rings, the last product, the stores
constexpr int64_t join_cycles = 6144;  // a second launch and its latencies
constexpr int64_t key_tile_cycles(int64_t dim) { return 16 * dim; }   // 2 * 128 * 128 * D multiply-adds, 2048 a cycle
constexpr int64_t part_move_cycles(int64_t dim) { return 16 * dim; }  // 128 * D floats read at 32 bytes a cycle

// Splits the keys of the tiles of the last, partial wave on `blocks` blocks where that is estimated to save a quarter
// of their time or more.
//
// Where the whole waves' tiles differ in length nothing is split: blocks with the short ones have time for the tail.
inline void split_where_it_pays(Plan& p, int blocks, int64_t dim, int64_t tile_cycles) {
  const int whole = p.tiles / blocks * blocks;
  if (whole == p.tiles) return;
  const auto segment_of = [&](int tile) {
    int i = 0;
    while (i + 1 < p.segment_count && tile >= p.segments[i + 1].first_tile) ++i;
    return i;
  };
  const int first = segment_of(whole), longest = key_tiles(p.segments[first]);
  if (whole && key_tiles(p.segments[0]) != key_tiles(p.segments[segment_of(whole - 1)])) return;
  Plan tail = p;
  tail.whole = whole;
  const auto works = [&](int parts) {  // of the tail, where the longest tiles are split into so many
    int64_t count = 0;
    for (int i = first; i < p.segment_count; ++i)
      count += (int64_t)tail_of(tail, i).count * tiles_of(key_tiles(p.segments[i]), tiles_of(longest, parts));
    return count;
  };
  int length = 0;
  int64_t allowed = (longest * tile_cycles + work_cycles) / 4 * 3;
  for (int64_t rounds = 1; rounds <= part_rounds; ++rounds) {
    int parts = (int)std::min<int64_t>(longest / part_least, rounds * blocks / tail_of(tail, first).count);
    while (parts > 1 && works(parts) > rounds * blocks) --parts;
    if (parts < 2) continue;
    const int keys = tiles_of(longest, parts);
    const int64_t cycles = rounds * (keys * tile_cycles + work_cycles + part_move_cycles(dim)) + join_cycles;
    if (cycles > allowed) continue;
    length = keys;
    allowed = cycles / 8 * 7;  // a second round, and with it twice the parts, for an eighth less
  }
  if (length) split_tail(p, whole, length);
}

// `tile_cycles`: of a tile of keys.
inline Plan split_plan(const AttentionParams& a, int blocks, int64_t tile_cycles) {
  Plan plan = make_plan(a);
  split_where_it_pays(plan, blocks, a.dim, tile_cycles);
  return plan;
}
inline Plan split_plan(const AttentionParams& a, int blocks) { return split_plan(a, blocks, key_tile_cycles(a.dim)); }

// Scratch of a plan: a Partial<D> for each work of a tail that was split.
inline int64_t scratch_floats(const Plan& p, int64_t dim) {
  return p.works > p.tiles ? (p.works - p.whole) * tile_queries * (dim + 2) : 0;
}

}  // namespace dsa_rt::cuda::hopper
