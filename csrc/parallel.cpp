// Why no OpenMP is linked, and how its threads are used all the same: PyTorch ships an OpenMP runtime of its own. A
// second one in the process means two teams of threads that spin against each other, and with some pairs a crash.
// But PyTorch loads its runtime with global symbols, so GOMP_parallel (the stable entry point that GCC's code calls,
// which the LLVM and Intel runtimes export too) can be looked up once at run time. That is PyTorch's own team, awake
// and sized by torch.set_num_threads. Where there is none, plain threads are started for the call.
//
// Pieces are handed out by a counter, so that the result does not depend on how many threads really come.
#include "parallel.h"

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace dsa_rt {
namespace {

using OpenMpParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

OpenMpParallel borrowed_openmp() {
  static const auto found = reinterpret_cast<OpenMpParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return found;
}

// The caller's rounding and denormal modes (torch.set_flush_denormal), which a worker thread does not inherit.
class FloatMode {
 public:
#if defined(__x86_64__)
  static unsigned current() { return _mm_getcsr() & control_bits; }
  explicit FloatMode(unsigned mode) : previous_(_mm_getcsr()) { _mm_setcsr((previous_ & ~control_bits) | mode); }
  ~FloatMode() { _mm_setcsr(previous_); }

 private:
  static constexpr unsigned control_bits = 0xFFC0;  // all but the sticky exception flags
  unsigned previous_;
#else
  static unsigned current() { return 0; }
  explicit FloatMode(unsigned) {}
#endif
};

struct Job {
  int64_t total, piece;
  RangeFunction function;
  void* context;
  unsigned float_mode;
  std::atomic<int64_t> next{0};

  void work() {
    const FloatMode mode(float_mode);
    for (int64_t begin; (begin = next.fetch_add(piece, std::memory_order_relaxed)) < total;)
      function(context, begin, std::min(begin + piece, total));
  }
};

}  // namespace

void parallel_ranges(int64_t total, int64_t grain, int threads, RangeFunction function, void* context) {
  grain = std::max<int64_t>(grain, 1);
  const int64_t most = (total + grain - 1) / grain;
  const int team = static_cast<int>(std::min<int64_t>(std::max(threads, 1), most));
  if (team <= 1) {
    if (total > 0) function(context, 0, total);
    return;
  }
  // Several for each thread even out those that lose their core for a while; as many for one as for another.
  const int64_t pieces = team * std::clamp<int64_t>(total / (team * grain), 1, 4);
  const int64_t piece = (total + pieces - 1) / pieces;
  Job job{total, piece, function, context, FloatMode::current()};
  if (const auto openmp = borrowed_openmp()) {
    openmp([](void* data) { static_cast<Job*>(data)->work(); }, &job, static_cast<unsigned>(team), 0);
    return;
  }
  std::vector<std::thread> helpers;
  helpers.reserve(static_cast<size_t>(team));
  try {
    for (int i = 1; i < team; ++i) helpers.emplace_back([&job] { job.work(); });
  } catch (const std::system_error&) {  // no more threads to be had: those that run take all pieces
  }
  job.work();
  for (auto& helper : helpers) helper.join();
}

const char* parallel_backend() { return borrowed_openmp() ? "openmp" : "threads"; }

}  // namespace dsa_rt
