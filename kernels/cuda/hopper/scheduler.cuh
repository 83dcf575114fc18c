// Who computes what: segments of queries, their tiles of queries and of keys, parts of tiles, and which block takes
// which work.
//
// A tile is 128 queries of one segment, batch and head. Tiles are numbered segment by segment, longest first, and
// inside a segment by batch, head and queries, so that neighbours read the same keys and values out of L2. The first
// `whole` tiles are one work each. The others, the tail, may have their keys split into parts, a work each, which leave
// partial results to be joined; parts are numbered by segment, part and tile, so that neighbours read the same keys
// here too. plan.h decides on the split.
//
// With G blocks, block b takes work b of the first G, work G - 1 - b of the next G, and so on back and forth, which
// evens out the load where segments differ in length. Every block finds its works by itself: no counter, the same
// order in every run.
#pragma once

#include <stdint.h>

#include "layout.cuh"

namespace dsa_rt::cuda::hopper {

constexpr int max_segments = 8;
constexpr int tile_queries = 128, tile_keys = 128;

DSA_RT_HOST_DEVICE constexpr int tiles_of(int items, int tile) { return items / tile + (items % tile != 0); }

// The queries from `first_query` on, and the rows [begin, end) they attend to: one range, or two, none of them empty.
struct Segment {
  int first_query, queries, ranges;
  int begin[2], end[2];
  int first_tile, first_work;
  int parts;  // of each of its tiles in the tail
};

struct Plan {
  int batch, heads, segment_count;
  int tiles, whole, works;  // tiles [whole, tiles) are the tail
  Segment segments[max_segments];
};

struct QueryTile {
  int batch, head, first;  // first: the tile's first query, counted in its segment
};

// Key tiles [first_keys, end_keys) for a tile of queries. slot: the part's number among the tail's, or -1 where the
// work is the whole tile and its result final.
struct Work {
  int segment;
  QueryTile tile;
  int first_keys, end_keys, slot;
};

// Where the parts of a tile of the tail are: at `slot`, slot + stride, ...; parts is 1 where there is nothing to join.
struct Parts {
  int segment;
  QueryTile tile;
  int parts, slot, stride;
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

// Part `part` of `parts` of n key tiles begins here: parts differ by one tile at most.
DSA_RT_HOST_DEVICE constexpr int part_begin(int n, int parts, int part) {
  const int longer = n % parts;
  return part * (n / parts) + (part < longer ? part : longer);
}

DSA_RT_HOST_DEVICE constexpr QueryTile query_tile(const Plan& p, const Segment& s, int tile) {
  const int tiles = tiles_of(s.queries, tile_queries);
  const int local = tile - s.first_tile, pair = local / tiles;
  return {pair / p.heads, pair % p.heads, (local - pair * tiles) * tile_queries};
}

// A segment's tiles in the tail: [first, first + count), count > 0, and the first one's first work.
struct Tail {
  int first, count, first_work;
};

DSA_RT_HOST_DEVICE constexpr Tail tail_of(const Plan& p, int segment) {
  const Segment& s = p.segments[segment];
  const int end = segment + 1 < p.segment_count ? p.segments[segment + 1].first_tile : p.tiles;
  const bool begins_before = s.first_tile < p.whole;
  const int first = begins_before ? p.whole : s.first_tile;
  return {first, end - first, begins_before ? p.whole : s.first_work};
}

DSA_RT_HOST_DEVICE constexpr Work work_of(const Plan& p, int index) {
  int segment = 0;
  while (segment + 1 < p.segment_count && index >= p.segments[segment + 1].first_work) ++segment;
  const Segment& s = p.segments[segment];
  const int keys = key_tiles(s);
  if (index < p.whole) return {segment, query_tile(p, s, index), 0, keys, -1};
  const Tail tail = tail_of(p, segment);
  const int local = index - tail.first_work, part = local / tail.count;
  const QueryTile tile = query_tile(p, s, tail.first + local - part * tail.count);
  if (s.parts == 1) return {segment, tile, 0, keys, -1};
  return {segment, tile, part_begin(keys, s.parts, part), part_begin(keys, s.parts, part + 1), index - p.whole};
}

DSA_RT_HOST_DEVICE constexpr Parts parts_of(const Plan& p, int tile) {
  int segment = 0;
  while (segment + 1 < p.segment_count && tile >= p.segments[segment + 1].first_tile) ++segment;
  const Segment& s = p.segments[segment];
  const Tail tail = tail_of(p, segment);
  return {segment, query_tile(p, s, tile), s.parts, tail.first_work - p.whole + tile - tail.first, tail.count};
}

// The work that block `block` of `blocks` takes in a round, or the following rounds' too, where >= p.works: none.
DSA_RT_HOST_DEVICE constexpr int64_t work_index(int64_t round, int block, int blocks) {
  return round * blocks + (round % 2 ? blocks - 1 - block : block);
}

}  // namespace dsa_rt::cuda::hopper
