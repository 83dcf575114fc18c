// Python's way in: the Hopper attention kernel on emulated blocks, its plan, and its layout arithmetic.
#include "kernels/cuda/hopper/attention.cuh"

#include <string.h>

#include "calls.h"
#include "kernels/cuda/hopper/support.h"

namespace dsa_rt::cuda::hopper {
alignas(1024) unsigned char memory[227 << 10];
}

using namespace dsa_rt;
using namespace dsa_rt::cuda::hopper;
using namespace emulated_calls;

namespace {

thread_local std::string said;

template <int D, Element element>
std::string run(const Request<AttentionParams>& r, const Plan& plan) {
  static_assert(shared_bytes<D> <= sizeof memory);
  const Arguments p = make_arguments<D, element>(r.params, plan, r.scratch);
  const int blocks = (int)std::min<int64_t>(plan.works, r.splitting.blocks);
  const std::string error = run_blocks(r, blocks, block_threads, [&] { attention_kernel<D, element>(p); });
  if (!error.empty()) return error;
  return run_join<D, element>(r, plan, p.result);
}

}  // namespace

extern "C" {

// Each returns what went wrong, or "".
const char* attention_refusal(const AttentionParams* p) { return (said = hopper_refusal(*p)).c_str(); }

const char* attention_run(const Request<AttentionParams>* r) {
  if (said = hopper_refusal(r->params); !said.empty()) return said.c_str();
  const Plan plan = plan_of(r->params, r->splitting);
  const auto runner = r->params.element == Element::bfloat16
                          ? (r->params.dim == 64 ? run<64, Element::bfloat16> : run<128, Element::bfloat16>)
                          : (r->params.dim == 64 ? run<64, Element::float16> : run<128, Element::float16>);
  said = runner(*r, plan);
  return said.c_str();
}

// How many floats of scratch the plan takes.
int64_t scratch_of(const AttentionParams* p, const Splitting* s) { return scratch_floats(plan_of(*p, *s), p->dim); }

// Tiles, whole tiles and works.
void plan_sizes(const AttentionParams* p, const Splitting* s, int64_t* sizes) {
  const Plan plan = plan_of(*p, *s);
  const int64_t all[3] = {plan.tiles, plan.whole, plan.works};
  memcpy(sizes, all, sizeof all);
}

// The works that a block takes, in order: first query (of all), batch, head, queries, first and end key tile, slot.
// Returns how many.
int64_t plan_works(const AttentionParams* p, const Splitting* s, int64_t block, int64_t* works) {
  const Plan plan = plan_of(*p, *s);
  const int blocks = (int)std::min<int64_t>(plan.works, s->blocks);
  int64_t count = 0;
  for (int64_t round = 0; block < blocks; ++round) {
    const int64_t index = work_index(round, (int)block, blocks);
    if (index >= plan.works) break;
    const Work w = work_of(plan, (int)index);
    const Segment& segment = plan.segments[w.segment];
    const int64_t row[7] = {segment.first_query + w.tile.first, w.tile.batch, w.tile.head,
                            std::min(tile_queries, segment.queries - w.tile.first), w.first_keys, w.end_keys, w.slot};
    memcpy(works + 7 * count++, row, sizeof row);
  }
  return count;
}

// The tiles that the second kernel joins: first query, batch, head, parts, first slot, stride. Returns how many.
int64_t plan_joins(const AttentionParams* p, const Splitting* s, int64_t* joins) {
  const Plan plan = plan_of(*p, *s);
  const int tiles = join_blocks<64>(plan) / (64 / join_columns * consumers);
  int64_t count = 0;
  for (int tile = plan.whole; tile < plan.whole + tiles; ++tile) {
    const Parts t = parts_of(plan, tile);
    if (t.parts == 1) continue;
    const int64_t row[6] = {plan.segments[t.segment].first_query + t.tile.first, t.tile.batch, t.tile.head, t.parts,
                            t.slot, t.stride};
    memcpy(joins + 6 * count++, row, sizeof row);
  }
  return count;
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
