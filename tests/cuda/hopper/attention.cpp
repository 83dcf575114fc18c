// Python's way in: the Hopper attention kernel on emulated blocks, its plan, and its layout arithmetic.
#include "kernels/cuda/hopper/attention.cuh"

#include <string.h>

#include "kernels/cuda/hopper/support.h"

namespace dsa_rt::cuda::hopper {
alignas(1024) unsigned char memory[227 << 10];
}

using namespace dsa_rt;
using namespace dsa_rt::cuda::hopper;

namespace {

struct Request {
  AttentionParams params;
  int64_t blocks;
  uint64_t seed;
  int64_t late;  // emulated::Kind
};

thread_local std::string said;

template <int D>
std::string run(const Request& r, const Plan& plan) {
  static_assert(shared_bytes<D> <= sizeof memory);
  const Arguments arguments = make_arguments<D>(r.params, plan);
  for (unsigned b = 0; b < r.blocks; ++b) {
    memset(memory, 0xFF, sizeof memory);  // bf16 NaN
    emulated::Block block(block_threads, b, (unsigned)r.blocks, r.seed + b, (emulated::Kind)r.late);
    emulated::block = &block;
    const std::string error = block.run([&] { attention_kernel<D>(arguments); });
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace

extern "C" {

// Each returns what went wrong, or "".
const char* attention_refusal(const AttentionParams* p) { return (said = hopper_refusal(*p)).c_str(); }

const char* attention_run(const Request* r) {
  if (said = hopper_refusal(r->params); !said.empty()) return said.c_str();
  const Plan plan = make_plan(r->params);
  said = r->params.dim == 64 ? run<64>(*r, plan) : run<128>(*r, plan);
  return said.c_str();
}

// The tiles that `block` of `blocks` takes, in order: first query (of all), batch, head, rows. Returns how many.
int64_t plan_tiles(const AttentionParams* p, int64_t block, int64_t blocks, int64_t* tiles) {
  const Plan plan = make_plan(*p);
  int64_t count = 0;
  for (int64_t round = 0;; ++round) {
    const int64_t index = tile_index(round, (int)block, (int)blocks);
    if (index >= plan.tiles) return count;
    const QueryTile t = query_tile(plan, (int)index);
    const Segment& s = plan.segments[t.segment];
    const int64_t row[4] = {s.first_query + t.first, t.batch, t.head, std::min(tile_queries, s.queries - t.first)};
    memcpy(tiles + 4 * count++, row, sizeof row);
  }
}

// The key tiles of the segment that holds a query: first row, rows. Returns how many.
int64_t key_tiles_of(const AttentionParams* p, int64_t query, int64_t* tiles) {
  const Plan plan = make_plan(*p);
  for (int i = 0; i < plan.segment_count; ++i) {
    const Segment& s = plan.segments[i];
    if (query < s.first_query || query >= s.first_query + s.queries) continue;
    for (int j = 0; j < key_tiles(s); ++j) {
      const KeyTile t = key_tile(s, j);
      tiles[2 * j] = t.row;
      tiles[2 * j + 1] = t.rows;
    }
    return key_tiles(s);
  }
  return -1;
}

uint64_t k_major_descriptor(uint32_t tile, int step, int rows) { return k_major(tile) + k_major_step(step, rows); }
uint64_t mn_major_descriptor(uint32_t tile, int step, int rows) { return mn_major(tile, rows) + mn_major_step(step); }
int params_bytes() { return sizeof(AttentionParams); }
int accumulator_row(int thread) { return fragment_row(thread); }
int accumulator_column(int thread) { return fragment_column(thread); }
int accumulator_of_pair(int step, int pair) { return operand_pair(step, pair); }

}  // extern "C"
