// The fibers of emulated launches, and the launchers as C functions for ctypes.
//
// Blocks run one after the other, those of a cooperative launch at the same time, each on a CPU thread. A CUDA thread
// runs until it has to wait for others of its block; a round over a block in which none gets further is a deadlock.
#include "cuda_runtime.h"

#include <ucontext.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../../kernels/cuda/layers.h"
#include "../../../kernels/cuda/quantize.h"
#include "../../../kernels/cuda/step.h"

thread_local dim3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t stack_bytes = 64 << 10;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  bool done = false;
};
struct Warp {
  Barrier barrier;
  float slots[32];
};
struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  long events = 0;  // barriers passed and threads ended
  ucontext_t scheduler;
};

thread_local Block* block = nullptr;
thread_local Fiber* fiber = nullptr;
const std::function<void()>* body = nullptr;
int processors = 4;

std::mutex lock;  // of what blocks share:
std::condition_variable changed;
Barrier grid_barrier;
std::string failure;

bool failed() {
  std::lock_guard<std::mutex> held(lock);
  return !failure.empty();
}
void set_failure(const char* why) {
  std::lock_guard<std::mutex> held(lock);
  if (failure.empty()) failure = why;
  changed.notify_all();
}
void leave() { swapcontext(&fiber->context, &block->scheduler); }

// `before`: what the last one to arrive does before all go on.
template <class Before>
void meet(Barrier& barrier, unsigned threads, Before before) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    before();
    barrier.arrived = 0;
    ++barrier.generation;
    ++block->events;
  }
  while (barrier.generation == generation) leave();
}

void wait_for_blocks() {
  std::unique_lock<std::mutex> held(lock);
  const unsigned generation = grid_barrier.generation;
  if (++grid_barrier.arrived == gridDim.x * gridDim.y) {
    grid_barrier.arrived = 0;
    ++grid_barrier.generation;
    changed.notify_all();
  }
  changed.wait(held, [&] { return grid_barrier.generation != generation || !failure.empty(); });
}

void thread_main() {
  (*body)();
  fiber->done = true;
  ++block->events;
  leave();
}

void run_block(unsigned x, unsigned y) {
  Block own{std::vector<Fiber>(blockDim.x), std::vector<Warp>((blockDim.x + 31) / 32), {}, 0, {}};
  block = &own;
  blockIdx = dim3(x, y);
  for (Fiber& f : own.fibers) {
    getcontext(&f.context);
    f.context.uc_stack = {};
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = stack_bytes;
    f.context.uc_link = nullptr;
    makecontext(&f.context, thread_main, 0);
  }
  for (bool left = true; left && !failed();) {
    const long before = own.events;
    left = false;
    for (unsigned i = 0; i < blockDim.x && !failed(); ++i) {
      fiber = &own.fibers[i];
      if (fiber->done) continue;
      left = true;
      threadIdx = dim3(i);
      swapcontext(&own.scheduler, &fiber->context);
    }
    if (left && before == own.events) set_failure("a deadlock");
  }
}

}  // namespace

void fail(const char* why) {
  set_failure(why);
  leave();
  __builtin_unreachable();
}
void meet_warp() {
  const unsigned first = threadIdx.x / 32 * 32;
  meet(block->warps[first / 32].barrier, std::min(32u, blockDim.x - first), [] {});
}
void meet_block() { meet(block->barrier, blockDim.x, [] {}); }
void meet_grid() { meet(block->barrier, blockDim.x, wait_for_blocks); }
float* exchange_slots() { return block->warps[threadIdx.x / 32].slots; }

int run(dim3 grid, dim3 threads, bool cooperative, const std::function<void()>& kernel) {
  gridDim = grid, blockDim = threads, body = &kernel, grid_barrier = {}, failure.clear();
  std::vector<std::thread> blocks;
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x && !failed(); ++x)
      if (cooperative)
        blocks.emplace_back(run_block, x, y);
      else
        run_block(x, y);
  for (std::thread& thread : blocks) thread.join();
  return failed();
}

}  // namespace emulator

const char* cudaGetErrorString(cudaError_t) { return emulator::failure.c_str(); }
cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = emulator::processors;
  return cudaSuccess;
}

namespace {
std::string message;

template <class Params, class Body>
const char* guarded(const Params& p, size_t size, Body body) {
  message.clear();
  if (size != sizeof p) return "the structure in emulation.py differs from the header's";
  try {
    body(p);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
}  // namespace

// Each returns what went wrong, "" where nothing did. size: of the structure.
#define EMULATED(op, Params)                                                            \
  extern "C" const char* op(const dsa_rt::Params* p, size_t size) {                     \
    return guarded(*p, size, [](const auto& params) { dsa_rt::cuda::op(params, 0); });  \
  }
EMULATED(norm_modulate, NormModulateParams)
EMULATED(rms_norm, RmsNormParams)
EMULATED(qk_norm_rope_store, QkNormRopeStoreParams)
EMULATED(confidence_pool, ConfidencePoolParams)
EMULATED(quantize_rows, QuantizeRowsParams)
EMULATED(philox_normal, PhiloxNormalParams)
EMULATED(renoise, RenoiseParams)
EMULATED(cached_step, CachedStepParams)
EMULATED(exit_decision, ExitDecisionParams)
extern "C" const char* move_rows(const dsa_rt::MoveRowsParams* p, size_t size, int scatter) {
  return guarded(*p, size, [&](const auto& params) { dsa_rt::cuda::move_rows(params, scatter, 0); });
}
