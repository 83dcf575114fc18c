// Who computes what: segments of queries, their tiles of queries and of keys, and which block takes which tile.
//
// A tile is 128 queries of one segment, batch and head. Tiles are numbered segment by segment, longest first, and
// inside a segment by batch, head and queries, so that neighbours read the same keys and values out of L2. With G
// blocks, block b takes tile b of the first G, tile G - 1 - b of the next G, and so on back and forth, which evens out
// the load where segments differ in length. Every block finds its tiles by itself: no counter, no scratch, the same
// order in every run.
#pragma once

#include <stdint.h>

#include <algorithm>

#include "../../attention.h"
#include "layout.cuh"

namespace dsa_rt::cuda::hopper {

constexpr int max_segments = 8;
constexpr int tile_queries = 128, tile_keys = 128;

DSA_RT_HOST_DEVICE constexpr int tiles_of(int items, int tile) { return items / tile + (items % tile != 0); }

// The queries from `first_query` on, and the rows [begin, end) they attend to: one range, or two, none of them empty.
struct Segment {
  int first_query, queries, ranges;
  int begin[2], end[2];
  int first_tile;
};

struct Plan {
  int batch, heads, segment_count, tiles;
  Segment segments[max_segments];
};

struct QueryTile {
  int segment, batch, head, first;  // first: the tile's first query, counted in its segment
};

struct KeyTile {
  int range, row, rows;  // rows, 1 to 128 of them, from `row` on
};

DSA_RT_HOST_DEVICE constexpr int range_tiles(const Segment& s, int range) {
  return tiles_of(s.end[range] - s.begin[range], tile_keys);
}

DSA_RT_HOST_DEVICE constexpr int key_tiles(const Segment& s) {
  return range_tiles(s, 0) + (s.ranges == 2 ? range_tiles(s, 1) : 0);
}

DSA_RT_HOST_DEVICE constexpr KeyTile key_tile(const Segment& s, int index) {
  const int first = range_tiles(s, 0), range = index >= first;
  const int row = s.begin[range] + (range ? index - first : index) * tile_keys, left = s.end[range] - row;
  return {range, row, left < tile_keys ? left : tile_keys};
}

DSA_RT_HOST_DEVICE constexpr QueryTile query_tile(const Plan& p, int index) {
  int segment = 0;
  while (segment + 1 < p.segment_count && index >= p.segments[segment + 1].first_tile) ++segment;
  const int tiles = tiles_of(p.segments[segment].queries, tile_queries);
  const int local = index - p.segments[segment].first_tile, pair = local / tiles;
  return {segment, pair / p.heads, pair % p.heads, (local - pair * tiles) * tile_queries};
}

// The tile that block `block` of `blocks` takes in a round, or the following rounds' too, where >= p.tiles: none.
DSA_RT_HOST_DEVICE constexpr int64_t tile_index(int64_t round, int block, int blocks) {
  return round * blocks + (round % 2 ? blocks - 1 - block : block);
}

// The plan of checked arguments, at most 8 segments: empty ranges and segments dropped, ranges in the order of their
// rows, adjoining ones joined. `tiles` saturates where it exceeds an int.
inline Plan make_plan(const AttentionParams& a) {
  const AttentionSegment all = {a.active, {0, 0}, {a.rows, 0}};
  const AttentionSegment* given = a.segments ? a.segments : &all;
  Plan p = {};
  p.batch = (int)a.batch;
  p.heads = (int)a.heads;
  int first_query = 0;
  for (int64_t i = 0; i < (a.segments ? a.segment_count : 1); ++i) {
    Segment s = {first_query, (int)given[i].queries, 0, {}, {}, 0};
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
    p.segments[i].first_tile = (int)std::min<int64_t>(tiles, INT32_MAX);
    tiles += a.batch * a.heads * tiles_of(p.segments[i].queries, tile_queries);
  }
  p.tiles = (int)std::min<int64_t>(tiles, INT32_MAX);
  return p;
}

}  // namespace dsa_rt::cuda::hopper
